"""Images as conditions: read with the prompts, checked before weights are loaded, one a pipeline call, kept apart."""

import json

import diffusers
import imageio.v3 as iio
import pytest
import torch
from PIL import Image

from alignment.check import check_images
from alignment.config import DataConfig, EvaluationConfig
from alignment.data import Prompt, by_image, conditions, read_prompts
from alignment.embeddings import EmbeddingCache
from alignment.errors import UserError
from alignment.evaluation import evaluate
from alignment.metrics import read_metrics
from alignment.self_check import self_check
from tests.alignment.tiny import make_policy, make_run
from tests.pipelines import FAMILIES, PROMPTS

COLOURS = ("red", "blue", "green")


@pytest.fixture
def pictures(tmp_path):
    """Folder of prompts.jsonl with three prompts on two images, and of three pictures."""
    (tmp_path / "pictures").mkdir()
    for colour in COLOURS:
        Image.new("RGB", (16, 16), colour).save(tmp_path / "pictures" / f"{colour}.png")
    rows = [("a", "red"), ("b", "blue"), ("c", "red")]
    write(tmp_path, [{"prompt": text, "image": f"pictures/{colour}.png"} for text, colour in rows])
    return tmp_path


def write(folder, rows):
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_paths_are_those_from_the_file(pictures):
    prompts = read_prompts(pictures / "prompts.jsonl")
    red = str(pictures / "pictures/red.png")
    assert [prompt.image for prompt in prompts] == [red, str(pictures / "pictures/blue.png"), red]
    assert prompts[0].meta == {"image": red}  # rewards see which image it was
    assert by_image(prompts) == [[0, 2], [1]]
    assert conditions(prompts[:1])["image"].getpixel((0, 0)) == (255, 0, 0)
    table = pictures / "prompts.csv"
    table.write_text(f"prompt,image,tag\na,pictures/red.png,x\nb,,y\nc,{pictures}/pictures/blue.png,\n")
    images = [prompt.image for prompt in read_prompts(table)]
    assert images == [red, None, str(pictures / "pictures/blue.png")]
    assert conditions([Prompt("b", {})]) == {}


def test_images_become_rgb(pictures):
    Image.new("RGBA", (4, 4), (0, 255, 0, 0)).save(pictures / "clear.png")
    Image.new("L", (4, 4), 7).save(pictures / "grey.png")
    rows = [{"prompt": "a", "image": "clear.png"}, {"prompt": "b", "image": "grey.png"}]
    for prompt, value in zip(read_prompts(write(pictures, rows)), [(0, 255, 0), (7, 7, 7)], strict=True):
        image = conditions([prompt])["image"]
        assert (image.mode, image.getpixel((0, 0))) == ("RGB", value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file or directory"),
        (b"no image", "cannot identify image file"),
        ("cut short", "image file is truncated"),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_images_that_cannot_be_read_are_named_with_their_line(pictures, content, words, suffix):
    bad = pictures / "bad.jpg"
    if content == "cut short":
        Image.effect_noise((64, 64), 50).save(bad)
        bad.write_bytes(bad.read_bytes()[:-500])
    elif content is not None:
        bad.write_bytes(content)
    path = write(pictures, [{"prompt": "a", "image": "pictures/red.png"}, {"prompt": "b", "image": "bad.jpg"}])
    line = 2
    if suffix == "csv":
        path, line = pictures / "prompts.csv", 3
        path.write_text("prompt,image\na,pictures/red.png\nb,bad.jpg\n")
    with pytest.raises(UserError) as caught:
        read_prompts(path)
    message = str(caught.value)
    assert message.startswith(f"data.prompts: {path}: line {line}: cannot read the image {bad}: ")
    assert words in message
    assert "\n" not in message
    assert message.count("bad.jpg") == 1


def test_an_image_that_is_no_path(pictures):
    with pytest.raises(UserError, match="line 1: \"image\" is no path but \\['a.png'\\]"):
        read_prompts(write(pictures, [{"prompt": "a", "image": ["a.png"]}]))


# --- check -----------------------------------------------------------------------------------------------------------

IMAGE, TEXT = Prompt("a", {}, "a.png"), Prompt("b", {})


@pytest.mark.parametrize(
    ("name", "prompts", "words"),
    [
        ("WanImageToVideoPipeline", [IMAGE, TEXT], "WanImageToVideoPipeline starts from an image, 'b' has none; add"),
        ("LTXImageToVideoPipeline", [TEXT], "LTXImageToVideoPipeline starts from an image, 'b' has none; add"),
        ("WanPipeline", [TEXT, IMAGE], "WanPipeline takes no image, 'a' has one; rename the column \"image\""),
        ("WanImageToVideoPipeline", [IMAGE], None),
        ("WanPipeline", [TEXT], None),
        ("LTXConditionPipeline", [TEXT, IMAGE], None),  # from text, too
        ("DiffusionPipeline", [TEXT, IMAGE], None),  # known once it is loaded
    ],
)
def test_prompts_and_pipelines_that_do_not_fit(name, prompts, words):
    pipeline = getattr(diffusers, name)
    good = [prompt for prompt in prompts if words is None or f"{prompt.text!r} has" not in words]
    if words is None:
        check_images(pipeline, prompts, prompts)
        return
    for key, pair in (("data.prompts", (prompts, good)), ("evaluation.prompts", (good, prompts))):
        with pytest.raises(UserError) as caught:
            check_images(pipeline, *pair)
        assert str(caught.value).startswith(f"{key}: {words}")


@pytest.fixture(scope="module")
def base_i2v(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "i2v"
    FAMILIES["wan_image_to_video"]()[0].save_pretrained(folder)
    return folder


@pytest.fixture
def i2v(recipe, base_i2v, pictures):
    """The recipe on a tiny WanImageToVideoPipeline."""
    recipe["model"] |= {"path": str(base_i2v), "drop_encoders": True}
    recipe["call"] |= {"max_sequence_length": 512}
    recipe["data"] = {"prompts": str(pictures / "prompts.jsonl")}
    recipe["algorithm"]["prompts_per_iteration"] = 3
    recipe["evaluation"] |= {"num_prompts": 4}
    return recipe


@pytest.mark.parametrize("check", [True, False])
def test_refused_in_one_line(command, i2v, pictures, base, check):
    (pictures / "text.txt").write_text("a\n")
    (pictures / "missing.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "image": "none.png"}\n')
    for override, words in [
        (
            f"data.prompts={pictures}/text.txt",
            "data.prompts: WanImageToVideoPipeline starts from an image, 'a' has none",
        ),
        (f"evaluation.prompts={pictures}/text.txt", "evaluation.prompts: WanImageToVideoPipeline starts from an image"),
        (f"data.prompts={pictures}/missing.jsonl", f"line 2: cannot read the image {pictures}/none.png: No such file"),
        (f"model.path={base}", "data.prompts: WanPipeline takes no image, 'a' has one"),
        ("call.image=a.png", 'call.image: an image belongs to a prompt; name it in a column "image" of data.prompts'),
    ]:
        outcome = command(override, *["--check"] * check)
        assert outcome.code == 2
        assert words in outcome.only_line()
        assert not outcome.folder.exists()


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_of_image_to_video(command, i2v, tmp_path):
    """Micro-batches change nothing; every sample begins with its own picture."""
    assert command("--check").code == 0
    whole = command()
    assert (whole.code, whole.err) == (0, "")
    rows = read_metrics(whole.folder / "metrics.jsonl")
    assert [row["ratio/first_deviation"] for row in rows] == [0, 0]
    assert rows[-1]["drift/weights"] > 0
    parts = command("batch.rollout=1", "batch.update=1", "evaluation.batch=3", f"output={tmp_path / 'parts'}")
    for one, other in zip(rows, read_metrics(parts.folder / "metrics.jsonl"), strict=True):
        for name in ("reward/bright", "grad_norm", "loss"):
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6)
    first, second = (json.loads((f / "samples/000000/scores.json").read_text()) for f in (whole.folder, parts.folder))
    assert first["prompts"] == ["a", "b", "c", "a"]
    assert first["values"]["reward/bright"] == pytest.approx(second["values"]["reward/bright"], rel=1e-4)


@pytest.mark.parametrize("batch", [None, 2, 1])
def test_evaluation_keeps_the_order_of_the_prompts(tmp_path, pictures, batch, monkeypatch):
    """a, b, c, a, b on red, blue, red, red, blue: calls of one image each, results where their prompts stand."""
    policy = make_policy("wan_image_to_video")
    del policy.call["image"]
    data = DataConfig(prompts=str(pictures / "prompts.jsonl"))
    run = make_run(tmp_path, policy, data=data, evaluation=EvaluationConfig(num_prompts=5, videos=5, batch=batch))
    seen, generate = [], run.policy.generate

    def marked(prompts, seeds, *arguments, image):
        """Videos in the colour of their image, and as bright as their prompt's place in the alphabet."""
        colour = torch.tensor(image.getpixel((0, 0))) / 255
        seen.append((tuple(prompts), image.getpixel((0, 0))))
        films = [colour * (1 - (ord(text) - ord("a")) / 4) for text in prompts]
        assert generate(prompts, seeds, *arguments, image=image).shape == (len(prompts), 5, 3, 16, 16)
        return torch.stack(films)[:, None, :, None, None].expand(-1, 5, 3, 16, 16)

    monkeypatch.setattr(run.policy, "generate", marked)
    groups, score = [], run.scorer.__class__.__call__

    def scored(self, videos, prompts, rows, duels):
        groups.extend(rows)
        return score(self, videos, prompts, rows, duels)

    monkeypatch.setattr(run.scorer.__class__, "__call__", scored)
    evaluate(run, 0)
    values = json.loads((run.folder / "samples/000000/scores.json").read_text())["values"]
    assert values["reward/brightness"] == pytest.approx([1 / 3, 3 / 4 / 3, 2 / 4 / 3, 1 / 3, 3 / 4 / 3])
    assert all(colour == ((0, 0, 255) if set(texts) == {"b"} else (255, 0, 0)) for texts, colour in seen)
    assert sorted(groups) == [0, 1, 2, 3, 4]
    assert len(seen) == {None: 2, 2: 3, 1: 5}[batch]
    means = [iio.imread(run.folder / f"samples/000000/{i:02d}.mp4").mean((0, 1, 2)).round() for i in range(5)]
    assert [int(film.argmax()) for film in means] == [0, 2, 0, 0, 2]  # red, blue, red, red, blue
    assert means[0][0] > means[2][0] + 50


@pytest.mark.parametrize(("family", "each"), [("wan_image_to_video", False), ("ltx_image_to_video", True)])
def test_the_self_check_finds_how_the_pipeline_wants_the_image(family, each):
    """Wan one for all samples, LTX one for each; then rollout, replay and evaluation have it so."""
    policy = make_policy(family)
    size = policy.call["height"]
    del policy.call["image"]
    image = Image.new("RGB", (size, size), "red")
    self_check(policy, PROMPTS[0], image=image)
    assert policy.image_each == each
    red = policy.generate(PROMPTS, [1, 2], image=image)
    assert len(red) == 2
    assert not torch.equal(red, policy.generate(PROMPTS, [1, 2], image=Image.new("RGB", (size, size), "blue")))


def test_an_error_that_is_not_the_images_keeps_its_words():
    policy = make_policy("wan_image_to_video", call={"height": 17})
    image = policy.call.pop("image")
    with pytest.raises(ValueError, match="`height` and `width` have to be divisible by 16"):
        self_check(policy, PROMPTS[0], image=image)


# --- embeddings ------------------------------------------------------------------------------------------------------


def with_images(folder):
    """A cache on a pipeline whose encode_prompt takes images too; and the pairs that reached it."""
    pipe, _ = FAMILIES["wan"]()
    encode, reached = pipe.encode_prompt, []

    def encode_prompt(image=None, prompt=None, max_sequence_length=32, device=None):
        images = image if isinstance(image, list) else [image] * len(prompt)
        colours = [picture.getpixel((0, 0)) for picture in images]
        reached.append(list(zip(prompt, colours, strict=True)))
        embeds, _ = encode(prompt, do_classifier_free_guidance=False, max_sequence_length=max_sequence_length)
        tints = torch.tensor([sum(c * 256**i for i, c in enumerate(colour)) / 2**24 for colour in colours])
        return embeds + tints[:, None, None]

    pipe.encode_prompt = encode_prompt
    return EmbeddingCache.install(pipe, folder), encode_prompt, reached


def test_embeddings_of_other_images_are_others(tmp_path):
    """One entry for each pair of prompt and pixels, whatever the object or file they come from."""
    cache, plain, reached = with_images(tmp_path)
    red, blue, red_again = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "red"))
    for images, prompts in [([red, blue], ["a", "a"]), ([blue, red_again], ["a", "b"]), ([red_again, red], ["a", "b"])]:
        found = cache(image=images, prompt=prompts)
        calls = len(reached)
        assert torch.allclose(found, plain(image=images, prompt=prompts), atol=1e-6)
        del reached[calls:]
    pairs = {pair for call in reached for pair in call}
    assert pairs == {("a", (255, 0, 0)), ("a", (0, 0, 255)), ("b", (255, 0, 0))}
    assert len(reached) == 3 + 1  # and one that tells what has a row for each prompt
    assert len(list(tmp_path.iterdir())) == 3
    assert not cache.hold(["a"])  # no list of prompts says which images they will have


def test_an_image_for_all_is_left_to_the_pipeline(tmp_path):
    cache, plain, _ = with_images(tmp_path)
    for colour in ("red", "blue"):
        image = Image.new("RGB", (4, 4), colour)
        found = cache(image=image, prompt=PROMPTS)
        assert torch.equal(found, plain(image=image, prompt=PROMPTS))
    assert not list(tmp_path.iterdir())
    assert not cache.hold(PROMPTS)
