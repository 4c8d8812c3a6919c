"""Training of reward models that read a video and a prompt: their data, losses, networks and files."""
