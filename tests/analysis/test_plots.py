"""The curves of runs: what is in the picture, for runs of any length."""

from __future__ import annotations

from dataclasses import replace

import pytest
from made_run import RESULT, make_run, record

from fastcifar.analysis.picture import draw
from fastcifar.analysis.plots import applied_lr, plot_curves, plot_lr, plot_run, plot_split
from fastcifar.config import ScheduleConfig
from fastcifar.engine.run import draw_curves
from fastcifar.optim.schedules import lr_table
from fastcifar.runs.console import Console
from fastcifar.runs.folder import Run

AVERAGES = {"ema-0.99": 0.62, "ema-0.999": 0.62}


def records(epochs: int, table: list[float]):
    """Of four steps each, with a validation split and two averages that come to the same."""
    validated = {"validation_loss": 1.2, "validation_accuracy": 0.6, "averaged_validation_accuracies": AVERAGES}
    return [record(n, epochs=epochs, lr=table[4 * n - 1], train_loss=2 / n, **validated) for n in range(1, epochs + 1)]


def panels(figure):
    return {axes.get_title(): axes for axes in figure.axes}


@pytest.mark.parametrize("epochs", [1, 10, 200])
def test_every_curve_is_there_and_can_be_told_from_the_others(epochs, tmp_path):
    table = lr_table(ScheduleConfig(warmup="2st"), 0.1, 4, epochs)
    result = replace(RESULT, averaged_test_accuracies={"ema-0.99": 0.25, "ema-0.999": 0.25}, chosen_epochs={})
    title = "r1_$x_y$-" + "long" * 50
    arguments = records(epochs, table), table, title, result
    figure = plot_curves(*arguments)
    assert draw(tmp_path / "curves.png", plot_curves, *arguments) is None
    assert figure.get_suptitle().startswith("r1_$x_y$-long")
    assert figure.get_suptitle().endswith("…")
    shown = panels(figure)
    assert len(shown) == (3 if epochs < 200 else 4)
    curves = shown["accuracy (%)"].lines
    assert [line.get_label() for line in curves[:4]] == [
        "train",
        "validation",
        "validation, ema-0.99",
        "validation, ema-0.999",
    ]
    assert len({(line.get_color(), line.get_linestyle(), line.get_linewidth()) for line in curves[:4]}) == 4
    assert curves[1].get_linewidth() > curves[2].get_linewidth(), "so that what lies upon it leaves it visible"
    assert all(len(line.get_xdata()) == epochs for line in curves[:4])
    assert list(curves[1].get_ydata()) == pytest.approx([60.0] * epochs)
    assert all(line.get_marker() not in (None, "None") for line in curves[:4]) == (epochs < 200)
    assert shown["learning rate"].lines[0].get_ydata().tolist() == table, "of every step"
    assert shown["loss"].get_yscale() == ("linear" if epochs == 1 else "log" if epochs == 200 else "linear")
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 7
    assert all(axes.get_legend() is None for axes in figure.axes)


def test_what_the_run_came_to_is_marked_where_it_comes_from():
    table = lr_table(ScheduleConfig(), 0.1, 4, 3)
    figure = plot_curves(
        records(3, table), table, "a run", replace(RESULT, chosen_epochs={"weights": 1, "ema-0.999": 2})
    )
    marks = {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
        for line in panels(figure)["accuracy (%)"].lines[4:]
    }
    assert marks == {
        "final test, weights: 50.00% (best epoch 1)": ([1], [50.0]),
        "final test, ema-0.999: 25.00% (best epoch 2)": ([2], [25.0]),
    }
    last = plot_curves(records(3, table), table, "a run", replace(RESULT, chosen_epochs={}))
    assert "final test, weights: 50.00% (last epoch 3)" in [text.get_text() for text in last.legends[0].get_texts()]


def test_the_applied_rate_is_the_tables_but_where_a_plateau_lowered_it():
    table = lr_table(ScheduleConfig("step", warmup="2st"), 0.1, 4, 3)
    assert applied_lr(records(3, table), table) == table
    lowered = [record(n, lr=factor * table[4 * n - 1]) for n, factor in ((1, 1), (2, 0.5), (3, 0.25))]
    assert applied_lr(lowered, table) == pytest.approx(
        table[:4] + [0.5 * lr for lr in table[4:8]] + [0.25 * lr for lr in table[8:]]
    )


def test_the_curves_of_a_folder(tmp_path):
    """Of two epochs of four steps."""
    run = make_run(tmp_path / "my_run")
    figure = plot_run(run)
    assert figure.get_suptitle() == "my_run: resnet"
    assert len(panels(figure)["learning rate"].lines[0].get_xdata()) == 8
    draw_curves(run, Console())
    assert (run.path / "curves.png").exists()


def test_a_broken_folder_costs_only_the_curves(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    (run.path / "config.json").write_text("{")
    draw_curves(run, Console())
    assert capsys.readouterr().out.startswith("curves.png was not drawn (")
    assert not (run.path / "curves.png").exists()
    (tmp_path / "empty").mkdir()
    draw_curves(Run(tmp_path / "empty"), Console())
    assert not list((tmp_path / "empty").iterdir())


def test_rates_and_splits_of_any_size(tmp_path):
    assert draw(tmp_path / "one.png", plot_lr, [0.1], 1, []) is None
    assert draw(tmp_path / "split.png", plot_split, {"forward": 1e-3, "idle": 0.0}, {}, "a step of $x_{") is None
