"""The report where a part of it is missing, or its settings are many."""

from test_report import the_grid

from deepvit.commands.main import main
from deepvit.report.figures import charts


def test_a_missing_run_to_compare_costs_the_comparison_alone(make_run, tmp_path, capsys, undrawn):
    first = make_run("a")
    assert main(["report", str(tmp_path), "--compare", str(first), "/nope", "--out", str(tmp_path / "r")]) == 2
    said = capsys.readouterr()
    assert "/nope does not exist" in said.err and said.err.count("\n") == 1 and (tmp_path / "r/report.html").exists()


def test_schedules_that_change_together_are_named_by_one(make_run, tmp_path, recwarn):
    for at in range(5):
        make_run(str(at), schedule__epochs=5 + at, schedule__warmup_epochs=at, optimizer__lr=0.1 * (at + 1))
    (name,) = the_grid(tmp_path).extras
    assert name in ("schedule.epochs", "schedule.warmup_epochs", "optimizer.lr")
    assert charts(the_grid(tmp_path)) and not recwarn.list


def test_a_config_that_would_run_code_is_left_out(make_run, tmp_path, capsys):
    folder, trap = make_run("a"), tmp_path / "executed"
    (folder / "config.yaml").write_text(f"model: !!python/object/apply:os.mkdir ['{trap}']\n")
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "r")]) == 2 and not trap.exists()
    assert "config.yaml cannot be read" in capsys.readouterr().err


def test_lines_of_one_colour_are_of_one_attention_in_all_panels(make_run, tmp_path):
    for at, (name, rate) in enumerate((("contrast", 0.1), ("centred", 0.2), ("contrast", 0.2))):
        make_run(str(at), model__attention={"name": name, "class": "SelfAttention"}, optimizer__lr=rate)
    made = {chart.name: chart for chart in charts(the_grid(tmp_path))}
    for chart in (made["curves"], made["blocks"]):
        drawn = {(line.get_label(), line.get_color()) for axes in chart.figure.axes for line in axes.lines
                 if line.get_label() in ("contrast", "centred")}
        assert len(drawn) == len({colour for _, colour in drawn}) == 2
