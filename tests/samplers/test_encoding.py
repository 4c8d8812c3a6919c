"""Videos to states and back, for every family: encoding inverts what the pipeline itself does after its loop."""

from contextlib import contextmanager
from types import SimpleNamespace

import diffusers
import pytest
import torch

from samplers import Encoder, decode, rollout, sde_scheduler
from samplers.rollout import patched
from tests.pipelines import FAMILIES, build, clip_call, wan_parts, wan_transformer
from tests.samplers.test_noised import rows_of

GLUED = {"ltx_image_to_video": 1, "wan_first_frame": 1}  # latent frames that the pipeline takes from the image


def wan_first_frame():
    """Wan 2.2's small image-to-video model: a timestep for each token, the first frame put over the state's."""
    pipe = diffusers.WanImageToVideoPipeline(
        **wan_parts(), transformer=wan_transformer(), expand_timesteps=True, image_processor=None, image_encoder=None
    )
    call = clip_call(image=torch.rand(1, 3, 16, 16), guidance_scale=3.0, max_sequence_length=32)
    return pipe, call


BUILT = {**FAMILIES, "wan_first_frame": lambda: build(wan_first_frame)}


@pytest.fixture(scope="module", params=BUILT)
def family(request):
    """(name, pipe, call for two prompts, encoder)."""
    pipe, call = BUILT[request.param]()
    return request.param, pipe, call, Encoder(pipe, **rows_of(call, 0))


@contextmanager
def decoded(pipe):
    """The latents (B, ...) that the VAE is given."""
    found = []

    def seeing(original):
        return lambda latents, *args, **kwargs: (found.append(latents), original(latents, *args, **kwargs))[1]

    with patched(pipe.vae, "decode", seeing):
        yield found


def videos_for(encoder, seed=0):
    return torch.rand(2, *encoder.video_shape, generator=torch.Generator().manual_seed(seed))


def posterior_mode(pipe, videos):
    pixels = (2 * videos - 1).to(pipe.vae.dtype)
    pixels = pixels.transpose(1, 2) if hasattr(pipe, "video_processor") else pixels[:, 0]
    return pipe.vae.encode(pixels).latent_dist.mode()


@torch.no_grad()
def test_the_pipeline_decodes_states_to_what_its_vae_makes_of_the_videos(family):
    name, pipe, call, encoder = family
    videos = videos_for(encoder)
    states = encoder(videos)
    assert (states.shape, states.dtype) == ((2, *encoder.state_shape), torch.float32)
    with decoded(pipe) as latents:
        made = decode(pipe, states, **call)
    mode, glued = posterior_mode(pipe, videos), GLUED.get(name, 0)
    torch.testing.assert_close(latents[0][:, :, glued:], mode[:, :, glued:], rtol=0, atol=1e-5)
    if not glued:
        expected = pipe.vae.decode(mode, return_dict=False)[0] / 2 + 0.5
        expected = expected.transpose(1, 2) if expected.dim() == 5 else expected
        torch.testing.assert_close(made, expected.clamp(0, 1), rtol=0, atol=5e-5)  # HunyuanVideo's enlarges rounding


@torch.no_grad()
def test_latents_of_a_generated_state_encode_to_that_state(family):
    """The VAE is left out: it returns what the pipeline gave it to decode."""
    name, pipe, call, encoder = family
    stock = pipe.scheduler
    pipe.scheduler = sde_scheduler(stock.config)
    with decoded(pipe) as latents:
        state = rollout(pipe, [], [1, 2], [3, 4], **call).state
    pipe.scheduler = stock
    posterior = SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: latents[0]))
    with patched(pipe.vae, "encode", lambda _: lambda pixels: posterior):
        back = encoder(videos_for(encoder))
    if name == "wan_first_frame":  # of the state's first frame nothing is left
        assert back[:, :, 0].abs().max() == 0
        state, back = state[:, :, 1:], back[:, :, 1:]
    torch.testing.assert_close(back, state, rtol=0, atol=1e-4)


@torch.no_grad()
def test_states_follow_the_published_normalisation(family):
    """Where it is known in closed form; independent of the pipeline's code."""
    name, pipe, call, encoder = family
    videos = videos_for(encoder, seed=1)
    mode, states, config = posterior_mode(pipe, videos), encoder(videos), pipe.vae.config
    if name.startswith(("wan", "skyreels", "sana")):
        mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
        expected = (mode - mean) / std
        glued = GLUED.get(name, 0)
        states, expected = states[:, :, glued:], expected[:, :, glued:]
    elif name == "mochi":
        mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
        expected = (mode - mean) / std * config.scaling_factor
    elif name == "ltx":  # a token for each place, in the order frame, row, column
        expected = mode.flatten(2).transpose(1, 2) * config.scaling_factor
    elif name == "ltx_image_to_video":
        expected = mode[:, :, 1:] * config.scaling_factor
    elif name == "cogvideox":
        expected = mode.transpose(1, 2) * config.scaling_factor
    elif name == "flux":  # a token for 2 x 2 places
        expected = (mode - config.shift_factor) * config.scaling_factor
        expected = expected.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    else:
        expected = (mode - (config.get("shift_factor") or 0)) * config.scaling_factor
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)


def test_latent_frame_of_every_element(family):
    name, _, _, encoder = family
    frames = {"stable_diffusion_3": 1, "flux": 1, "stable_diffusion": 1, "cogvideox": 3}.get(name, 2)
    assert encoder.latent_frames == frames
    assert encoder.frame_of.dtype == torch.long
    expected = torch.zeros(encoder.state_shape, dtype=torch.long)
    if name == "ltx":
        expected[4:] = 1  # 2 frames of 2 x 2 tokens
    elif name == "ltx_image_to_video":
        expected[:] = 1  # the first frame is the image's
    elif name == "cogvideox":
        expected += torch.arange(3).view(-1, 1, 1, 1)
    elif frames > 1:
        expected[:, 1] = 1
    assert torch.equal(encoder.frame_of, expected)


def test_only_videos_of_the_call_are_encoded(family):
    _, _, _, encoder = family
    frames, channels, height, width = encoder.video_shape
    for shape in [(frames + 1, channels, height, width), (frames, channels, height, 2 * width)]:
        with pytest.raises(ValueError, match=r"the pipeline's are \(\d+, 3, \d+, \d+\)"):
            encoder(torch.rand(1, *shape))


@pytest.mark.parametrize("name", ["wan", "wan_first_frame", "ltx", "ltx_image_to_video", "hunyuan_video", "flux"])
def test_in_bfloat16(name):
    """As precise as the latents, and not less: Wan's tail would round them to the VAE's dtype before it shifts them."""
    pipe, call = BUILT[name]()
    pipe.to(torch.bfloat16)
    with torch.no_grad():
        encoder = Encoder(pipe, **rows_of(call, 0))
        states = encoder(videos_for(encoder))
        assert states.dtype == torch.float32
        decode(pipe, states, **call)
    if name == "wan":
        config, mode = pipe.vae.config, posterior_mode(pipe, videos_for(encoder))
        mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
        torch.testing.assert_close(states, (mode.float() - mean) / std, rtol=1e-5, atol=1e-5)


def test_the_pipeline_is_left_as_it_was():
    pipe, call = FAMILIES["wan"]()
    pipe.to(torch.bfloat16)
    scheduler, random = pipe.scheduler, torch.get_rng_state()
    Encoder(pipe, **rows_of(call, 0))
    assert pipe.scheduler is scheduler
    assert not {"decode", "dtype"} & set(vars(pipe.vae))
    assert pipe.vae.dtype == torch.bfloat16
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    "tail",
    [
        lambda latents, *_: latents.tanh(),  # bends
        lambda latents, *_: latents.cumsum(2),  # mixes
        lambda latents, *_: latents + torch.randn_like(latents),  # draws
        lambda latents, *_: latents.detach(),  # cuts
        lambda latents, *_: 0 * latents,  # forgets
    ],
    ids=["bends", "mixes", "draws", "cuts", "forgets"],
)
def test_other_tails_are_refused(tail):
    pipe, call = FAMILIES["ltx"]()
    pipe._denormalize_latents = tail
    with pytest.raises(ValueError, match="LTXPipeline does not .* videos cannot be encoded"):
        Encoder(pipe, **rows_of(call, 0))


def test_noise_before_decoding_is_refused_and_said_how_to_leave_out():
    pipe, call = FAMILIES["ltx"]()
    config = {key: value for key, value in pipe.vae.config.items() if not key.startswith("_")}
    pipe.vae = diffusers.AutoencoderKLLTXVideo.from_config({**config, "timestep_conditioning": True}).eval()
    one = {**rows_of(call, 0), "decode_timestep": 0.05}
    with pytest.raises(ValueError, match="decode_noise_scale, set it to 0"):
        Encoder(pipe, **one, decode_noise_scale=0.025)
    Encoder(pipe, **one, decode_noise_scale=0.0)


def test_two_prompts_are_refused():
    pipe, call = FAMILIES["wan"]()
    with pytest.raises(ValueError, match="the state of one prompt"):
        Encoder(pipe, **call)
