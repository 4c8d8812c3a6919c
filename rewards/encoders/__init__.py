"""The core of the rewards of images: CLIP checkpoints of either library, and how images are prepared for them."""
