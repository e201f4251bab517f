"""`niwaki train` and `niwaki resume` in this process; real kills are in test_kills.py."""

import json
import shutil

import pytest

import niwaki.train.loop


class Killed(BaseException):
    """As good as a kill: nothing may be written after it."""


WORDS = ("train", "python:nets.py:small", "--data", "digits", "--epochs", "2", "--batch", "64", "--set", "limit=6")


@pytest.fixture
def dies(monkeypatch):
    """Let the process die at a batch: no handler of an error has its turn."""
    real = niwaki.train.loop.Loop._step

    def at(batch):
        count = [0]

        def step(self, group, order):
            count[0] += 1
            if count[0] == batch:
                raise Killed
            return real(self, group, order)

        monkeypatch.setattr(niwaki.train.loop.Loop, "_step", step)

    yield at
    monkeypatch.undo()


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_a_run_has_all_its_files_and_its_weights_serve_elsewhere(run, here):
    said = run(*WORDS, "--out", "r", "--json")
    assert said.code == 0, said.err
    report = said.data["report"]
    assert report == json.loads((here / "r/report.json").read_text())
    assert report["after"]["accuracy"]["value"] > report["before"]["accuracy"]["value"]
    assert report["validation"]["accuracy"]["definition"].startswith("top-1 accuracy on 179 of 179")
    assert [epoch["epoch"] for epoch in report["history"]["epochs"]] == [1, 2]
    names = {path.name.split(".out")[0] for path in (here / "r").iterdir()}
    files = {"settings.json", "history.json", "history.jsonl", "checkpoints", "model.safetensors", "report.json",
             "report.html"}  # fmt: skip
    assert names == files | {"events"}
    settings = json.loads((here / "r/settings.json").read_text())
    assert settings["training"]["lr"] == 0.1 and settings["task"]["batch"] == 64 and settings["arguments"][0] == "train"
    again = run("measure", "python:nets.py:small", "--checkpoint", "r/model.safetensors", "--data", "digits",
                "--runs", "0", "--json")  # fmt: skip
    assert again.data["accuracy"]["value"] == report["after"]["accuracy"]["value"]
    shown = run("report", "r")
    assert shown.code == 0 and "On the validation split" in shown.out
    page = (here / "r/report.html").read_text()
    assert "validation accuracy over the epochs" in page and "<h2>Training</h2>" in page
    last = sorted((here / "r/checkpoints").iterdir())[-1]
    assert weights(last) == weights(here / "r")  # nothing was averaged: the last checkpoint's are those


def test_the_number_of_best_checkpoints_is_an_option(run, here):
    words = (*WORDS[:5], "1", *WORDS[6:], "--keep-best", "3", "--set", "checkpoints.keep_last=1", "--set", "limit=1")
    words = [word for word in words if word != "limit=6"]
    words.remove("--set")
    assert run(*words, "--out", "k").code == 0
    settings = json.loads((here / "k/settings.json").read_text())
    assert settings["training"]["checkpoints"] == {"every_steps": None, "keep_last": 1, "keep_best": 3}
    said = run(*words, "--set", "checkpoints.keep_best=2", "--out", "twice")
    assert said.code == 2 and "--keep-best as well" in said.err


def test_it_goes_on_from_a_checkpoint(run, here):
    assert run(*WORDS, "--out", "a").code == 0
    said = run(*WORDS, "--out", "b", "--checkpoint", "a/model.safetensors", "--lr", "0.01", "--json")
    first, second = (json.loads((here / name / "report.json").read_text()) for name in "ab")
    assert said.code == 0 and second["before"]["accuracy"]["value"] == first["after"]["accuracy"]["value"]
    assert second["history"]["settings"]["lr"] == 0.01


@pytest.mark.parametrize("batch", [1, 4, 9, 12])
def test_a_run_that_died_is_resumed_to_the_same_bits(run, here, dies, batch):
    more = (
        "--set",
        "checkpoints.every_steps=3",
        "--set",
        "ema=true",
        "--set",
        "mix.cutmix=1",
        "--augment",
        "flip_crop",
    )
    assert run(*WORDS, *more, "--out", "whole").code == 0
    dies(batch)
    with pytest.raises(Killed):
        run_past_handlers(*WORDS, *more, "--out", "broken")
    dies(10**9)
    assert not (here / "broken/report.json").exists()
    refused = run(*WORDS, *more, "--out", "broken")
    if batch > 3:
        assert refused.code == 2 and "niwaki resume broken" in refused.err
        said = run("resume", "broken", "--json")
        assert said.code == 0 and said.data["report"]["after"]["accuracy"], said.err
    assert weights(here / "broken") == weights(here / "whole")
    again = run("resume", "broken")
    assert again.code == 0 and "ended already" in again.err and "accuracy" in again.out


def run_past_handlers(*words):
    """The command without what turns exceptions into exit codes."""
    import shlex

    import typer

    from niwaki.cli import app

    command = typer.main.get_command(app)
    command.main(args=list(words), standalone_mode=False, obj=shlex.join(["niwaki", *words]))


def test_a_run_resumes_from_elsewhere_and_not_where_it_was_moved(run, here, dies, monkeypatch):
    dies(9)
    with pytest.raises(Killed):
        run_past_handlers(*WORDS, "--out", "r")
    dies(10**9)
    shutil.copytree(here / "r", here / "moved")
    moved = run("resume", "moved")
    assert moved.code == 2 and "move it back there" in moved.err
    (here / "below").mkdir()
    monkeypatch.chdir(here / "below")
    assert run("resume", "../r").code == 0 and (here / "r/report.json").is_file()


COMPRESS = ("compress", "python:nets.py:small", "--data", "digits", "--keep", "0.5", "--batch", "64", "--recover", "2",
            "--recovery-set", "limit=6", "--runs", "0")  # fmt: skip


def test_a_compression_that_died_in_its_recovery_is_resumed(run, here, dies, monkeypatch):
    more = ("--recovery-set", "checkpoints.every_steps=2", "--distill", "logits", "--method", "taylor")
    assert run(*COMPRESS, *more, "--out", "whole").code == 0
    assert not (here / "whole.partial").exists()
    assert json.loads((here / "whole/settings.json").read_text())["recovery"]["folder"] is None
    assert (here / "whole/recovery/history.jsonl").is_file()
    dies(9)
    with pytest.raises(Killed):
        run_past_handlers(*COMPRESS, *more, "--out", "broken")
    dies(10**9)
    assert not (here / "broken").exists() and (here / "broken.partial/plan.json").is_file()
    refused = run(*COMPRESS, *more, "--out", "broken")
    assert refused.code == 2 and "niwaki resume broken" in refused.err

    def never(*_, **__):
        raise AssertionError("the plan is not chosen again")

    with monkeypatch.context() as patch:
        patch.setattr("niwaki.methods.one_shot.collect", never)
        said = run("resume", "broken", "--json")
    assert said.code == 0, said.err
    assert weights(here / "broken") == weights(here / "whole") and not (here / "broken.partial").exists()
    assert (here / "broken/plan.json").read_bytes() == (here / "whole/plan.json").read_bytes()
    assert len(said.data["report"]["history"]["epochs"]) == 2 and run("report", "broken").code == 0
    assert run("resume", "broken").code == 0


def test_a_compression_that_died_before_its_recovery_leaves_nothing_to_resume(run, here, dies):
    dies(1)
    with pytest.raises(Killed):
        run_past_handlers(*COMPRESS, "--out", "broken")
    assert not (here / "broken").exists() and not (here / "broken.partial").exists()


def test_force_starts_again(run, here, dies):
    dies(9)
    with pytest.raises(Killed):
        run_past_handlers(*COMPRESS, "--out", "r")
    dies(10**9)
    plain = run(*COMPRESS[:8], "--runs", "0", "--out", "r", "--force")
    assert plain.code == 0 and not (here / "r/recovery").exists(), (
        plain.err
    )  # that of the run which died is not its own
    dies(9)
    with pytest.raises(Killed):
        run_past_handlers(*COMPRESS, "--out", "r", "--force")
    dies(10**9)
    assert run(*COMPRESS, "--out", "r", "--force").code == 0
    assert (here / "r/recovery").exists() and not (here / "r.partial").exists()


def test_adamw_has_a_rate_of_its_own(run, here):
    words = (*COMPRESS[:8], "--runs", "0", "--recover", "1", "--recovery-set", "limit=1")
    rates = {}
    for number, more in enumerate((("--optimizer", "adamw"), ("--optimizer", "adamw", "--lr", "0.01"), ())):
        said = run(*words, *more, "--out", str(number), "--json")
        rates[number] = said.data["report"]["history"]["settings"]["lr"]
    assert rates == {0: 0.001, 1: 0.01, 2: 0.01}


WRONG = {
    "no data": (("train", "python:nets.py:small", "--out", "r"), "found: no data"),
    "setting": ((*WORDS, "--out", "r", "--set", "epoch=3"), "unknown setting of training 'epoch'"),
    "group": ((*WORDS, "--out", "r", "--set", "mix.cut=3"), "setting of training.mix 'cut'"),
    "value": ((*WORDS, "--out", "r", "--set", "mix.cutmix=much"), "training.mix.cutmix = 'much'"),
    "range": ((*WORDS, "--out", "r", "--set", "accumulate=0"), "at least 1"),
    "twice": ((*WORDS, "--out", "r", "--set", "epochs=3"), "--epochs as well"),
    "folder": ((*WORDS, "--out", "r", "--set", "folder=x"), "the run's own"),
    "both": ((*WORDS, "--out", "r", "--set", "mix=3", "--set", "mix.cutmix=1"), "mix=3"),
    "optimizer": ((*WORDS, "--out", "r", "--optimizer", "lion"), "known: sgd, adamw"),
    "smoothing": ((*WORDS, "--out", "r", "--label-smoothing", "1"), "give a share in"),
    "recovery": ((*COMPRESS[:8], "--out", "r", "--recovery-set", "clip=1"), "give --recover EPOCHS"),
    "recovery setting": ((*COMPRESS, "--out", "r", "--recovery-set", "x=1"), "unknown setting of training 'x'"),
    "place": ((*WORDS, "--out", "nets.py/r"), "write a run to nets.py/r"),
    "name": ((*WORDS, "--out", "x" * 300), "File name too long"),
    "nothing": (("resume", "nowhere"), "no such folder"),
    "no run": (("resume", "."), "no run"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_and_nothing_is_left(run, here, name):
    words, says = WRONG[name]
    said = run(*words)
    assert said.code == 2 and says in said.err, said.err
    assert sorted(path.name for path in here.iterdir() if path.name != "__pycache__") == ["nets.py"]


def test_what_was_written_down_is_checked(run, here):
    folder = here / "r"
    folder.mkdir()
    for text, says in (
        ("{", "settings.json"),
        ("[]", "settings.json"),
        ('{"arguments": [1], "cwd": "."}', "without what was typed"),
        ('{"arguments": ["report", "r"], "cwd": "."}', "known: train, compress"),
        ('{"arguments": ["train"], "cwd": "/no/such/place"}', "is gone"),
    ):
        (folder / "settings.json").write_text(text)
        said = run("resume", "r")
        assert said.code == 2 and says in said.err, (text, said.err)


def test_no_run_is_trained_over(run, here):
    (here / "r").mkdir()
    (here / "r/precious.txt").write_text("mine")
    for more in ((), ("--force",)):
        said = run(*WORDS, "--out", "r", *more)
        assert said.code == 2 and (here / "r/precious.txt").read_text() == "mine"
    assert run(*WORDS, "--out", "s").code == 0
    before = (here / "s/report.json").read_bytes()
    assert run(*WORDS, "--out", "s").code == 2 and (here / "s/report.json").read_bytes() == before
    failed = run(*WORDS, "--out", "s", "--force", "--set", "mix.cut=3")
    assert failed.code == 2 and (here / "s/report.json").read_bytes() == before
    assert run(*WORDS, "--out", "s", "--force", "--seed", "1").code == 0
    assert (here / "s/report.json").read_bytes() != before


def test_a_run_that_is_replaced_stays_until_the_new_one_is_whole(run, here, dies):
    assert run(*WORDS, "--out", "r").code == 0
    assert run(*WORDS, "--seed", "1", "--out", "whole").code == 0
    old = {name: (here / "r" / name).read_bytes() for name in ("report.json", "model.safetensors", "history.json")}
    again = (*WORDS, "--seed", "1", "--out", "r", "--force")

    def kept():
        return all((here / "r" / name).read_bytes() == content for name, content in old.items())

    failed = run(*again, "--lr", "1e30", "--set", "warmup=0", "--set", "schedule=constant")
    assert failed.code == 2 and "lower lr" in failed.err and kept() and not (here / "r.partial").exists()
    dies(1)
    with pytest.raises(Killed):
        run_past_handlers(*again)
    assert kept() and not (here / "r.partial").exists()
    dies(9)
    with pytest.raises(Killed):
        run_past_handlers(*again)
    dies(10**9)
    assert kept() and sorted(path.name for path in (here / "r.partial/checkpoints").iterdir())
    assert "niwaki resume r" in run(*WORDS, "--out", "r").err
    assert run("resume", "r").code == 0
    assert weights(here / "r") == weights(here / "whole") != old["model.safetensors"]
    assert not (here / "r.partial").exists() and not [p for p in here.iterdir() if p.name.startswith(".")]
    for name, part in (("history.json", "settings"), ("settings.json", "training")):
        assert json.loads((here / "r" / name).read_text())[part]["folder"] == "r"
    assert "ended already" in run("resume", "r").err


def test_the_report_of_a_training_speaks_of_no_cut(run, here):
    assert run(*WORDS, "--out", "r").code == 0
    said = run("report", "r")
    page = (here / "r/report.html").read_text()
    for text in (said.out, page):
        assert "Trained Sequential: accuracy " in text
        assert not any(words in text for words in ("No receipt", "smaller", "stay", "has a rule"))


def test_a_loss_that_is_not_finite_leaves_checkpoints_to_look_at(run, here):
    said = run(*WORDS, "--out", "r", "--lr", "1e30", "--set", "warmup=0", "--set", "schedule=constant")
    assert said.code == 2 and "lower lr" in said.err and not (here / "r").exists()
