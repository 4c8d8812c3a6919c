"""The run report: made from a run as training leaves it, and from what a crash leaves of one."""

import json
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from alignment.report import load_run, write_report
from alignment.report.videos import MAX_PAIRS, video_width

from .fake_run import PAIR_CONFIG, make_pair_metrics, make_pair_run, make_run, sampled

VOID = {"meta", "br", "link", "img"}  # SVG closes its own


class Page(HTMLParser):
    """Checks that every tag is closed in order; collects tags, attributes and text."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def text(run):
    return write_report(run).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def parsed(text):
    return Page(text)


def test_page_is_well_formed_and_alone(text, parsed):
    assert text.startswith("<!DOCTYPE html>")
    assert "http://" not in text
    assert "https://" not in text
    references = [attrs[key] for _, attrs in parsed.tags for key in ("src", "href") if key in attrs]
    assert references
    assert all(reference.startswith("data:video/mp4;base64,") for reference in references)
    assert not {"link", "script", "iframe", "img"} & {tag for tag, _ in parsed.tags}
    assert "url(" not in text


def test_prompts_are_escaped(text):
    assert "<script" not in text
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt; &amp; a blue circle" in text


def test_videos_are_embedded_in_pairs(run, parsed):
    videos = parsed.all("video")
    assert len(videos) == 4
    assert all({"autoplay", "loop", "muted", "playsinline"} <= set(video) for video in videos)
    assert all(video["class"] == "tiny" for video in videos)
    assert len({video["src"] for video in videos}) == 4
    assert video_width((run / "samples/000000/00.mp4").read_bytes()) == 32
    assert "The first 2 of 32 evaluation prompts, not selected" in parsed.text


def test_numbers_of_the_page_are_those_of_the_logs(run, parsed):
    before, _, after = load_run(run).evaluations
    mean = [np.mean(e["values"]["reward/motion"]) for e in (before, after)]
    assert f"{mean[0]:.3f} to {mean[1]:.3f}" in parsed.text
    assert f"+{mean[1] - mean[0]:.3f}" in parsed.text
    assert "9,216 function evaluations, 384 an iteration" in parsed.text
    assert "dance_grpo on examples/tiny_world/model trained for motion, seed 0" in parsed.text
    assert "Every clip was valid for motion" in parsed.text
    assert "Held out: shape" in parsed.text
    assert "torch" in parsed.text


def test_page_of_a_healthy_run_has_no_warning(parsed):
    marks = [attrs["class"] for attrs in parsed.all("span") if attrs.get("class", "").startswith("mark")]
    assert marks
    assert set(marks) <= {"mark good", "mark note"}


def test_curves_are_drawn(parsed):
    titles = [attrs["aria-label"] for attrs in parsed.all("svg")]
    for title in (
        "Trained reward",
        "shape",
        "Ratio",
        "Gradient norm",
        "Gradient share",
        "Pictures",
        "Seconds an iteration",
    ):
        assert title in titles
    assert "KL to the reference" not in titles  # logged as null
    assert "motion" not in titles  # the only trained reward is the mean
    numbers = " ".join(v for _, attrs in parsed.tags for k, v in attrs.items() if k in ("points", "cx", "cy"))
    assert "nan" not in numbers
    assert "inf" not in numbers


# --- runs on pairs ---------------------------------------------------------------------------------------------------


PAIR_CHARTS = ["Implicit accuracy", "Margin", "Error", "Margin by noise level"]
MEMBERS = ["better member", "worse member", "better member, held out", "worse member, held out"]


def titles_of(page: Page) -> list[str]:
    return [attrs["aria-label"] for attrs in page.all("svg")]


def figure_of(text: str, title: str) -> str:
    """The HTML of one chart."""
    (figure,) = [part.split("</figure>")[0] for part in text.split("<figure>") if f'aria-label="{title}"' in part]
    return figure


def test_curves_of_given_pairs(tmp_path):
    text = write_report(make_pair_run(tmp_path)).read_text()
    page = Page(text)
    assert [title for title in titles_of(page) if title in PAIR_CHARTS] == PAIR_CHARTS
    assert not {"Pairs an iteration", "Ties", "Ratio", "Clip fraction", "Pictures"} & set(titles_of(page))
    accuracy, error, levels = (
        figure_of(text, title) for title in ("Implicit accuracy", "Error", "Margin by noise level")
    )
    assert "held-out pairs, iteration 120: 0.614" in accuracy
    assert all(f"</i>{name}</span>" in error for name in MEMBERS)
    assert accuracy.count('class="level"') == error.count('class="level"') == 1  # one half, and the reference
    assert levels.count("<polyline") == 4
    assert "0.75 to 1.00" in levels
    assert "nan" not in text
    assert "n/a" not in text


def test_nothing_was_trained_on_the_rewards_of_given_pairs(tmp_path):
    page = Page(write_report(make_pair_run(tmp_path)).read_text())
    assert "flow_dpo on examples/tiny_world/model trained on clips/pairs.jsonl, seed 0" in page.text
    assert "Pairs told apart" in page.text
    assert "61.4% of those held out" in page.text
    assert "rained reward" not in page.text
    assert "with the spread" not in page.text
    assert titles_of(page)[:2] == ["Reward", "shape"]
    assert "rollout" not in figure_of(write_report(tmp_path).read_text(), "Seconds an iteration")


def test_curves_of_sampled_pairs(tmp_path):
    config = PAIR_CONFIG.replace("clips/pairs.jsonl", "null").replace("clips/held_out.jsonl", "null")
    run = make_run(tmp_path, 120, (), 0, config, sampled(make_pair_metrics()))
    text = write_report(run).read_text()
    titles = titles_of(Page(text))
    assert titles[0] == "Trained reward"
    assert [title for title in titles if title in PAIR_CHARTS] == PAIR_CHARTS
    assert {"Pairs an iteration", "Ties"} <= set(titles)
    assert "held out" not in figure_of(text, "Error")
    assert "of the training pairs, half is chance; over the last 40 iterations" in text


def test_a_run_on_given_pairs_before_its_last_evaluation(tmp_path):
    run = make_run(tmp_path, 60, ((0, 0.0),), 0, PAIR_CONFIG, make_pair_metrics()[:60])
    assert "so only its training can be shown" in Page(write_report(run).read_text()).text


def test_curves_of_weighted_samples(tmp_path):
    lines = [{"iteration": i, "loss": 1.0, "error": 1.1, "weight/effective": 0.6} for i in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert titles_of(Page(write_report(tmp_path).read_text())) == ["Loss", "Error", "Effective samples"]


# --- what a crash leaves ---------------------------------------------------------------------------------------------


def test_truncated_logs_leave_the_rest(tmp_path):
    run = make_run(tmp_path, iterations=5, evaluations=((0, 0.0), (4, 0.2)))
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 6, "reward/mean": 0.')
    (run / "samples/000004/scores.json").write_text('{"iteration": 4, "values": {"rewa')
    loaded = load_run(run)
    assert len(loaded.metrics) == 5
    assert len(loaded.evaluations) == 1
    page = Page(write_report(run).read_text())
    assert "line 6 of metrics.jsonl" in page.text
    assert len(page.all("video")) == 2  # of the one evaluation


def test_a_resumed_run_counts_each_iteration_once(tmp_path):
    lines = [{"iteration": i, "reward/mean": r} for i, r in ((1, 0.1), (2, 0.2), (3, 0.3), (2, 0.25), (3, 0.35))]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [line["reward/mean"] for line in load_run(tmp_path).metrics] == [0.1, 0.25, 0.35]


@pytest.mark.parametrize("left", [("config.yaml",), ("metrics.jsonl",), ("config.yaml", "metrics.jsonl"), ("samples",)])
def test_parts_of_a_run_still_make_a_page(tmp_path, run, left):
    for name in left:
        if name == "samples":
            (tmp_path / name / "000000").mkdir(parents=True)
            (tmp_path / name / "000000/scores.json").write_bytes((run / name / "000000/scores.json").read_bytes())
        else:
            (tmp_path / name).write_bytes((run / name).read_bytes())
    page = Page(write_report(tmp_path).read_text())
    assert page.all("h1")
    if left == ("samples",):
        assert "000000/00.mp4 is missing" in page.text
        assert not page.all("video")


def test_empty_logs_make_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert "Nothing has been logged yet" in Page(write_report(tmp_path).read_text()).text


def test_broken_config_is_shown_as_it_is(tmp_path):
    (tmp_path / "config.yaml").write_text("name: [unclosed <b>")
    page = Page(write_report(tmp_path).read_text())
    assert "name: [unclosed <b>" in page.text
    assert "config.yaml (" in page.text


def test_number_of_embedded_videos_is_bounded(tmp_path):
    run = make_run(tmp_path, iterations=1, evaluations=((0, 0.0), (1, 0.1)), videos=MAX_PAIRS + 3)
    page = Page(write_report(run).read_text())
    assert len([attrs for attrs in page.all("div") if attrs.get("class") == "pair"]) == MAX_PAIRS
    assert "3 more in samples/000001/ of the run folder" in page.text


def test_videos_outside_the_run_are_not_read(tmp_path):
    (tmp_path / "run").mkdir()
    run = make_run(tmp_path / "run", 1, ((0, 0.0),), videos=1)
    scores = json.loads((run / "samples/000000/scores.json").read_text())
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    (run / "samples/000000/scores.json").write_text(json.dumps(scores | {"videos": ["../../../secret.mp4"]}))
    assert not Page(write_report(run).read_text()).all("video")


def test_write_leaves_one_file_and_replaces_it(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "report.html").write_text("old")
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    assert "old" not in path.read_text()[:20]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "report.html"]


def test_command(tmp_path, run):
    def command(*arguments):
        return subprocess.run([sys.executable, "-m", "alignment.report", *arguments], capture_output=True, text=True)

    done = command(str(run))
    assert done.returncode == 0
    assert done.stdout.strip() == str(run / "report.html")
    failed = command(str(tmp_path))
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
    assert failed.stderr.count("\n") == 1
    assert command().returncode == 2


def test_evaluation_means_in_the_metrics_are_no_reward_dimensions(tmp_path):
    line = {
        "iteration": 1,
        "reward/mean": 0.5,
        "reward/motion/area": 1.0,
        "eval/reward/mean": 0.4,
        "eval/image/motion": 1,
    }
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line))
    titles = [attrs["aria-label"] for attrs in Page(write_report(tmp_path).read_text()).all("svg")]
    assert titles == ["Trained reward", "motion: area"]


def test_damaged_scores_are_skipped(tmp_path):
    run = make_run(tmp_path, 1, ((0, 0.0), (1, 0.1)), videos=0)
    path = run / "samples/000001/scores.json"
    scores = json.loads(path.read_text())
    scores["values"]["reward/motion"].pop()
    path.write_text(json.dumps(scores))
    loaded = load_run(run)
    assert [evaluation["iteration"] for evaluation in loaded.evaluations] == [0]
    assert loaded.unreadable == ["samples/000001/scores.json"]
