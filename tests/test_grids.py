"""What the config modules share: products of settings, names of starts, captions, tables."""

from experiments import config
from experiments.reporting import grids

FIELDS = config.to_dict(config.Train(epochs=2, seeds=(1, 2, 3)))


def test_the_first_field_varies_slowest():
    grid = grids.product(config.Train(), method=("base", "eoi"), density=(0.05, 0.1))
    found = [(train.method, train.density) for train in grid]
    assert found == [("base", 0.05), ("base", 0.1), ("eoi", 0.05), ("eoi", 0.1)]


def test_dense_networks_come_first_and_once():
    grid = grids.product_with_dense(config.Train(), method=("base", "eoi"))
    found = [(train.method, train.density) for train in grid]
    assert found == [("dense", 1.0), ("base", 0.1), ("eoi", 0.1)]


def test_a_start_is_named_by_criterion_and_method():
    rows = [{"method": method, "criterion": "snip"} for method in ("eoi", "dense")]
    assert [row["start"] for row in grids.with_start_names(rows)] == ["SNIP EOI", "dense"]


def test_every_start_has_a_name_of_its_own():
    grid = grids.starts_of(config.Train(), tuple(grids.STARTS), eoi={"scale": 2.0})
    assert len(set(map(config.digest, grid))) == len(grids.STARTS)
    rows = grids.with_start_names([config.to_dict(train) for train in grid])
    variants = dict(zip(grids.STARTS, (row["variant"] for row in rows), strict=True))
    assert len(set(variants.values())) == len(variants)
    assert variants["rescaled"] == "rescaled Base"
    assert variants["smupar"] == "SμPar"
    assert variants["blocks"] == "blocks of 128"
    assert rows[list(variants).index("blocks")]["start"] == "blocks of 128"
    assert variants["hadamard"] == "EOI, matching, Hadamard angles"
    assert variants["spread_matching_he"] == "EOI, spread, matching, He norm"
    assert rows[list(variants).index("spread")]["start"] == "ERK EOI, spread"
    # Rows of results that are older than these fields.
    assert grids.with_start_names([{"method": "eoi", "criterion": None}])[0]["variant"] == "EOI"


def test_a_caption_names_the_rates_that_were_tried():
    rows = [{**FIELDS, "learning_rates": rates} for rates in ([0.1, 0.2], [0.01, 0.02])]
    sentence = grids.settings_sentence(rows, "none")
    assert "best learning rate of 0.1, 0.2 or 0.01, 0.02 by the validation accuracy" in sentence
    # One line is trained at one rate, which is not that of the other.
    rows = [{**rows[0], "seed": 1, grids.RATE.key: 0.2}, {**FIELDS, "method": "base", "seed": 1}]
    table = grids.table_of_runs("rates", "", rows, "none", ("variant",), values=(grids.RATE,))
    tried, _, single = table.caption.partition(" by the validation accuracy of the first seed, ")
    assert tried.endswith("the best learning rate of 0.1, 0.2")
    assert single.startswith("learning rate 0.01 in the other lines, ")
    assert "| EOI | 0.2 |" in table.markdown()
    assert "| Base | 0.01 |" in table.markdown()


def test_a_caption_states_what_ran_and_what_the_paper_has():
    sentence = grids.settings_sentence([FIELDS], "100 epochs")
    for part in ("MNIST", "2 epochs", "128", "0.01", "seeds 1, 2, 3", "The paper: 100 epochs."):
        assert part in sentence
    # Of runs with results only their seeds count.
    assert "seed 2. " in grids.settings_sentence([FIELDS, {**FIELDS, "seed": 2}], "none")


def test_a_table_of_runs_has_a_line_a_start():
    rows = [{**FIELDS, "seed": seed, "test_accuracy": seed / 4} for seed in (1, 2, 3)]
    table = grids.table_of_runs("accuracy", "Accuracy", rows, "more", ("start",))
    assert "| ERK EOI | 50.00 ± 25.00 (n = 3) |" in table.markdown()


def test_a_figure_of_losses_has_a_panel_for_each_sparse_density_with_the_dense_network_in_it():
    line = {**FIELDS, "split": "train", "step": 1, "loss": 2.0}
    logged = [{**line, "density": density} for density in (0.1, 0.2)]
    logged += [{**line, "method": "dense", "density": 1.0}, {**line, "split": "test"}]
    figure = grids.loss_figure("loss", "Loss", "", logged, "model", "density")
    assert [panel.title for panel in figure.panels] == ["MLP-7, density 0.1", "MLP-7, density 0.2"]
    for panel, density in zip(figure.panels, (0.1, 0.2), strict=True):
        assert [row["density"] for row in panel.rows] == [density, 1.0]
    assert grids.loss_figure("loss", "Loss", "", [], "model", "density").panels == ()
