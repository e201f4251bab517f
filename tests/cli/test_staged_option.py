"""Methods of several trainings on the command line."""

import json

MODEL = ("compress", "python:nets.py:small", "--data", "digits", "--batch", "32", "--runs", "0", "--limit-test", "40")
SHORT = [word for s in ("dense", "sparse", "tune", "distil") for word in ("--set", f"{s}_epochs=1")]
ONCE = ("--recover", "1", "--recovery-set", "limit=2")


def test_every_stage_is_in_the_report(run, here):
    method = ("--method", "group_channel_pruning", "--set", "fractions=0.5,0.25", "--set", "groups=1,4")
    said = run(*MODEL, *method, *SHORT, *ONCE, "--keep", "0.6", "--of", "params", "--out", "runs/g", "--json")
    assert said.code == 0, said.err
    report = said.data["report"]
    stages = ["dense training", "sparse training", "cut", "folded constants", "batch-norm", "fine-tuning"]
    assert [stage["stage"] for stage in report["stages"]] == [*stages, "distillation"]
    assert report["method"]["fractions"] == [0.5, 0.25] and report["method"]["groups"] == ["1", "4"]
    assert [group["group"] for group in report["layer_groups"]] == ["1", "4"]
    for stage in ("dense", "sparse", "tune", "distil"):
        history = json.loads((here / "runs/g" / stage / "history.json").read_text())
        assert len(history["epochs"]) == 1
    assert not (here / "runs/g.partial").exists()
    assert run("load-check", "runs/g").code == 0


def test_what_is_missing_is_said_before_anything_is_trained(run, here):
    bare = ("compress", "python:nets.py:small", "--input", "1x1x8x8", "--method", "yolov8_cwd", "--out", "runs/x")
    said = run(*bare)
    assert said.code == 2 and "without data" in said.err and "--data" in said.err
    said = run(*MODEL, "--method", "group_channel_pruning", "--set", "fractions=half", "--out", "runs/x")
    assert said.code == 2 and "numbers with commas between" in said.err
    said = run(*MODEL, "--method", "group_channel_pruning", "--set", "groups=1", "--out", "runs/x")
    assert said.code == 2 and "in no group: 4.weight" in said.err
    said = run(*MODEL, "--method", "yolov8_cwd", "--set", "places=neck", "--out", "runs/x")
    assert said.code == 2 and "unknown module to tap 'neck'" in said.err
    assert not (here / "runs").exists() or not any((here / "runs").iterdir())


def test_they_are_listed(run):
    said = run("methods", "--json")
    assert {"group_channel_pruning", "yolov8_cwd"} <= {method["name"] for method in said.data}
    fields = {field["name"]: field for field in run("methods", "yolov8_cwd", "--json").data["fields"]}
    assert fields["schedule"]["type"] == "decreasing | increasing | constant"
    assert fields["tune_epochs"]["default"] == "100" and fields["tune_epochs"]["help"]
