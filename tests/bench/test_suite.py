"""Suites: cells out of axes, layers of values, and every mistake with its place."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import hypothesis.strategies as st
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings

from bench.errors import SuiteError, SuiteErrors
from bench.suite import CUSTOM_PATHS, DATASETS, Suite, is_lvis, load_suite, metrics_of
from diffinst.config import RELEASED, Config, DataConfig
from diffinst.data.catalog import NAMES, annotation_format
from diffinst.evaluation.scoring import metric_names

ROOT = Path(__file__).resolve().parents[2]
SUITES = sorted((ROOT / "suites").glob("*.yaml"))


def write(folder: Path, text: str) -> Path:
    path = folder / "s.yaml"
    path.write_text(textwrap.dedent(text))
    return path


def load(folder: Path, text: str, *overrides: str) -> Suite:
    return load_suite(write(folder, text), overrides)


def mistakes(folder: Path, text: str, *overrides: str) -> list[str]:
    """Each mistake as text, the folder taken off."""
    with pytest.raises(SuiteErrors) as caught:
        load(folder, text, *overrides)
    for error in caught.value.errors:
        assert "\n" not in str(error)
    return str(caught.value).replace(f"{folder}/", "").splitlines()


def axes_of(suite: Suite) -> list[tuple[object, ...]]:
    return [tuple(cell.axes.values()) for cell in suite.cells]


# -- what a suite says ------------------------------------------------------------------------------------------------


def test_the_smallest_suite_is_one_cell_of_defaults(tmp_path: Path) -> None:
    suite = load(tmp_path, "description: nothing special\n")
    assert suite.name == "s"
    assert [cell.axes for cell in suite.cells] == [{"seed": 0}]
    assert suite.cells[0].config == suite.base == Config()
    assert suite.measure.latency_images == 10
    assert suite.source_text == "description: nothing special\n"


def test_product_and_zip_and_seeds(tmp_path: Path) -> None:
    suite = load(
        tmp_path,
        """
        axes:
          product: {sampling_steps: [1, 4], sampler.num_proposals: [20, 50]}
          zip: {backbone: [tiny, resnet50], learning_rate: [1.0e-3, 1]}
        seeds: [7, 8]
        """,
    )
    assert list(suite.cells[0].axes) == ["sampling_steps", "num_proposals", "backbone", "learning_rate", "seed"]
    # The first axis is slowest, the seed fastest: 2 x 2 x 2 rows x 2 seeds.
    assert axes_of(suite)[:5] == [
        (1, 20, "tiny", 1e-3, 7),
        (1, 20, "tiny", 1e-3, 8),
        (1, 20, "resnet50", 1.0, 7),
        (1, 20, "resnet50", 1.0, 8),
        (1, 50, "tiny", 1e-3, 7),
    ]
    assert len(suite.cells) == 16
    for cell in suite.cells:
        assert cell.config.sampler.num_proposals == cell.axes["num_proposals"]
        assert cell.config.model.backbone == cell.axes["backbone"]
        assert cell.config.train.seed == cell.axes["seed"]


def test_exclude_takes_cells_away_and_include_adds_with_base_values(tmp_path: Path) -> None:
    suite = load(
        tmp_path,
        """
        sampler: {num_proposals: 300}
        axes:
          product: {sampling_steps: [1, 4], num_proposals: [20, 50]}
          exclude: [{sampling_steps: 4, num_proposals: 50}]
          include: [{sampling_steps: 8}, {eta: 0}]
        """,
    )
    assert [cell.axes for cell in suite.cells] == [
        {"sampling_steps": 1, "num_proposals": 20, "eta": 1.0, "seed": 0},
        {"sampling_steps": 1, "num_proposals": 50, "eta": 1.0, "seed": 0},
        {"sampling_steps": 4, "num_proposals": 20, "eta": 1.0, "seed": 0},
        {"sampling_steps": 8, "num_proposals": 300, "eta": 1.0, "seed": 0},
        {"sampling_steps": 1, "num_proposals": 300, "eta": 0.0, "seed": 0},
    ]


def test_include_alone_is_a_list_of_cells(tmp_path: Path) -> None:
    suite = load(tmp_path, "axes: {include: [{sampling_steps: 1}, {sampling_steps: 4, seed: 3}]}\nseeds: [0, 1]\n")
    assert axes_of(suite) == [(1, 0), (1, 1), (4, 3)]


def test_seed_is_an_axis_like_any_other(tmp_path: Path) -> None:
    assert axes_of(load(tmp_path, "axes: {product: {seed: [3, 4]}}\n")) == [(3,), (4,)]
    assert axes_of(load(tmp_path, "train: {seed: 9}\n")) == [(9,)]


def test_the_released_preset_is_the_bottom_layer(tmp_path: Path) -> None:
    suite = load(tmp_path, "preset: released\nsampler: {max_detections: 50}\n")
    for section, values in RELEASED.items():
        for field, value in values.items():
            expected = 50 if field == "max_detections" else value
            assert getattr(getattr(suite.base, section), field) == expected


def test_a_section_is_an_axis(tmp_path: Path) -> None:
    suite = load(
        tmp_path,
        """
        sampler: {sampling_steps: 4}
        axes:
          product: {sampler: [fixed, released, {eta: 0, renewal: false}], num_proposals: [20, 50]}
        """,
    )
    shown = [cell.axes["sampler"] for cell in suite.cells[::2]]
    assert shown == ["fixed", "released", "eta=0,renewal=false"]
    released = suite.cells[2].config
    assert released.sampler.ensemble == "all_but_last"
    assert released.sampler.sampling_steps == 4
    assert released.train.matcher == "fixed"
    variant = suite.cells[4].config.sampler
    assert (variant.eta, variant.renewal, variant.sampling_steps, variant.num_proposals) == (0.0, False, 4, 20)


def test_a_field_wins_over_its_section_whatever_comes_first(tmp_path: Path) -> None:
    for first, second in (("eta: [0.5]", "sampler: [{eta: 0}]"), ("sampler: [{eta: 0}]", "eta: [0.5]")):
        suite = load(tmp_path, f"axes: {{product: {{{first}, {second}}}}}\n")
        assert suite.cells[0].config.sampler.eta == 0.5


def test_preset_is_an_axis_and_a_sections_own_is_nearer(tmp_path: Path) -> None:
    suite = load(tmp_path, "axes: {product: {preset: [fixed, released]}}\n")
    assert [cell.config.train.matcher for cell in suite.cells] == ["fixed", "released"]
    for first, second in (("preset: [released]", "sampler: [fixed]"), ("sampler: [fixed]", "preset: [released]")):
        config = load(tmp_path, f"axes: {{product: {{{first}, {second}}}}}\n").cells[0].config
        assert (config.train.matcher, config.sampler.ensemble) == ("released", "all")


def test_values_that_fit_only_together_may_be_axes(tmp_path: Path) -> None:
    text = "model: {num_attention_heads: 6}\naxes: {product: {hidden_dim: [60, 66]}}\n"  # 256 is no multiple of 6
    assert axes_of(load(tmp_path, text)) == [(60, 0), (66, 0)]


# -- overrides --------------------------------------------------------------------------------------------------------


def test_overrides_replace_fields_settings_and_axes(tmp_path: Path) -> None:
    text = """
        train: {iterations: 100}
        axes: {product: {sampling_steps: [1, 4], schedule_steps: [[10], [20]]}}
        """
    sets = [
        "train.iterations=5",
        "weight_decay=0",
        "measure.latency=false",
        "latency_images=3",
        "seeds=[1, 2]",
        "preset=released",
    ]
    suite = load(tmp_path, text, *sets)
    assert suite.base.train.iterations == 5
    assert suite.base.train.weight_decay == 0.0
    assert suite.base.train.matcher == "released"
    assert not suite.measure.latency
    assert suite.measure.latency_images == 3
    assert len(suite.cells) == 8
    assert suite.overrides == tuple(sets)
    assert axes_of(load(tmp_path, text, "sampling_steps=8", "schedule_steps=[5, 6]")) == [(8, [5, 6], 0)]
    assert axes_of(load(tmp_path, text, "sampling_steps=[2, 3]", "schedule_steps=[[5]]")) == [(2, [5], 0), (3, [5], 0)]
    assert axes_of(load(tmp_path, text, "sampling_steps=2", "schedule_steps=[]", "seed=4")) == [(2, [], 4)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("iterations", "--set iterations: needs the form KEY=VALUE, for instance --set iterations=100"),
        ("=3", "--set =3: needs the form KEY=VALUE, for instance --set iterations=100"),
        (
            "itertions=3",
            "--set itertions=3: unknown key. Allowed: a field of model, sampler, train or data, preset, seeds, "
            "description, or a field of measure. Did you mean 'iterations'?",
        ),
        (
            "learning_rate=1e-4",
            "--set learning_rate=1e-4: '1e-4' is not allowed. Allowed: a number above 0. "
            "YAML reads 1e-4 as text: write 1.0e-4",
        ),
        (
            "measure.latncy=true",
            "--set measure.latncy=true: unknown key. Allowed: score, latency, latency_images, latency_seconds, memory, "
            "flops, training_step, "
            "training_step_count. Did you mean 'latency'?",
        ),
        ("dataset=nuclie", f"--set dataset=nuclie: 'nuclie' is not allowed. Allowed: {', '.join(DATASETS)}."),
        ("sampling_steps=0", "--set sampling_steps=0: 0 is not allowed. Allowed: an integer from 1 to 1000"),
        ("eta=0.5", "--set eta=0.5: eta is varied at s.yaml:1. Choose cells with --only, or change the suite"),
        ("batch_size=[", "--set batch_size=[: not valid YAML"),
    ],
)
def test_overrides_are_checked_like_the_file(tmp_path: Path, override: str, message: str) -> None:
    found = mistakes(tmp_path, "axes: {product: {sampling_steps: [1, 2]}, zip: {eta: [0, 1]}}\n", override)
    assert len(found) == 1
    assert found[0].startswith(message)


# -- mistakes ---------------------------------------------------------------------------------------------------------


def test_all_mistakes_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    found = mistakes(
        tmp_path,
        """\
        name: all
        preset: relased
        model:
          backbone: tinny
          hidden_dim: 64
          hidden_dim: 128
        train:
          learning_rate: 1e-4
          batch_size: 8.0
          sampling_steps: 4
        smapler: {eta: 0}
        axes:
          product:
            sampling_step: [1, 2]
            num_workers: [1, 2]
          zip: {eta: [0, 1], renewal: [true]}
        seeds: 3
        measure: {latency_image: 3}
        tables: [{rows: eta, columns: renewal, metric: segm/APP}]
        """,
        "iterations=0",
    )
    assert found == [
        "s.yaml:2:9: preset: 'relased' is not allowed. Allowed: fixed, released. Did you mean 'released'?",
        "s.yaml:4:13: model.backbone: 'tinny' is not allowed. Allowed: resnet50, resnet101, swin_t, swin_s, swin_b, "
        "swin_l, swin_b_384, swin_l_384, efficientnet_lite0, tiny. Did you mean 'tiny'?",
        "s.yaml:6:3: model.hidden_dim: duplicate key (first on line 5). Keep one of the two",
        "s.yaml:8:18: train.learning_rate: '1e-4' is not allowed. Allowed: a number above 0. "
        "YAML reads 1e-4 as text: write 1.0e-4",
        "s.yaml:9:15: train.batch_size: 8.0 is not allowed. Allowed: an integer of at least 1",
        "s.yaml:10:3: train.sampling_steps: unknown key. 'sampling_steps' belongs into section 'sampler'",
        "s.yaml:11:1: smapler: unknown key. Allowed: name, description, preset, model, sampler, train, data, engine, "
        "axes, seeds, measure, tables, plots, claims. Did you mean 'sampler'?",
        "s.yaml:14:5: axes.product.sampling_step: unknown field. Allowed: a field of model, sampler, train or data, "
        "one of these sections, preset, or engine. Did you mean 'sampling_steps'?",
        "s.yaml:15:5: axes.product.num_workers: no axis: num_workers never changes a result. Set it in its section",
        "s.yaml:16:3: axes.zip: the lists differ in length: eta has 2, renewal has 1. Give each as many values",
        "s.yaml:17:8: seeds: 3 is not allowed. Allowed: a list, each an integer of at least 0",
        "s.yaml:18:11: measure.latency_image: unknown key. Allowed: score, latency, latency_images, latency_seconds, "
        "memory, flops, training_step, "
        "training_step_count. Did you mean 'latency_images'?",
        "s.yaml:19:48: tables[0].metric: 'segm/APP' is not allowed. Allowed: metrics such as segm/AP, bbox/AP50, "
        "latency_s/total, flops. Did you mean 'segm/AP'?",
        "--set iterations=0: 0 is not allowed. Allowed: an integer of at least 1",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "s.yaml:1:1: not a suite. Allowed: a mapping with the keys name, description, preset, model,"),
        ("- 1\n", "s.yaml:1:1: not a suite."),
        ("name: ../x\n", "s.yaml:1:1: name: '../x' is not allowed. Allowed: up to 64 letters, digits,"),
        ("name: reports\n", "s.yaml:1:1: name: 'reports' is not allowed."),
        ("name: 3\n", "s.yaml:1:7: name: 3 is not allowed. Allowed: text. Put quotes around it"),
        ("product: {eta: [0]}\n", "s.yaml:1:1: product: unknown key. 'product' belongs into section 'axes'"),
        ("model: [1]\n", "s.yaml:1:8: model: [1] is not allowed. Allowed: a mapping of fields"),
        (
            "model: {hidden_dim: 60}\n",
            "s.yaml:1:1: model: hidden_dim (60) must be a multiple of num_attention_heads (8)",
        ),
        (
            "model: {num_train_timesteps: 5}\nsampler: {sampling_steps: 6}\nseeds: [0, 1]\n",
            "s.yaml:1:1: the suite: sampling_steps (6) must not exceed num_train_timesteps (5)",
        ),
        (
            "model: {num_train_timesteps: 5}\naxes: {product: {eta: [0, 1], sampling_steps: [4, 6]}}\n",
            "s.yaml:2:51: axes.sampling_steps: sampling_steps (6) must not exceed num_train_timesteps (5) "
            "(in the cells with sampling_steps=6)",
        ),
        (
            "axes: {product: {hidden_dim: [64, 60]}}\n",
            "s.yaml:1:35: axes.hidden_dim: hidden_dim (60) must be a multiple of num_attention_heads (8) "
            "(in the cells with hidden_dim=60)",
        ),
        ("data: {dataset: shapez}\n", "s.yaml:1:17: data.dataset: 'shapez' is not allowed. Allowed: shapes, coco,"),
        (
            "data: {dataset: custom, val_images: x}\n",
            "s.yaml:1:1: data: dataset custom needs train_annotations, train_images, val_annotations too",
        ),
        (
            "data: {val_images: x}\n",
            "s.yaml:1:1: data: val_images: only with dataset: custom, but the dataset is shapes",
        ),
        ("seeds: [1, 1]\n", "s.yaml:1:8: seeds: [1, 1] has a seed twice. Keep one of each"),
        ("seeds: []\n", "s.yaml:1:8: seeds: [] is not allowed."),
        ("seeds: [1]\ntrain: {seed: 2}\n", "s.yaml:2:15: train.seed: given besides seeds. Keep one of the two"),
        (
            "seeds: [1]\naxes: {product: {seed: [2]}}\n",
            "s.yaml:2:25: axes.seed: given besides seeds. Keep one of the two",
        ),
        ("axes: [1]\n", "s.yaml:1:7: axes: [1] is not allowed. Allowed: a mapping of product, zip, include, exclude"),
        (
            "axes: {eta: [1]}\n",
            "s.yaml:1:8: axes.eta: unknown key. Allowed: product, zip, include, exclude. Write 'product: {eta: [...]}'",
        ),
        ("axes: {product: {eta: []}}\n", "s.yaml:1:23: axes.product.eta: an axis needs at least one value"),
        ("axes: {product: {eta: 1}}\n", "s.yaml:1:23: axes.product.eta: 1 is not allowed. Allowed: a list of values"),
        ("axes: {product: {eta: [0, 2]}}\n", "s.yaml:1:27: axes.product.eta[1]: 2 is not allowed. Allowed: a number"),
        ("axes: {product: {eta: [0, 0.0]}}\n", "s.yaml:1:27: axes.product.eta: 0.0 is there twice. Keep one"),
        ("axes: {product: {eta: [0], sampler.eta: [1]}}\n", "s.yaml:1:28: axes.product.sampler.eta: duplicate key"),
        ("axes: {product: {eta: [0]}, zip: {eta: [1]}}\n", "s.yaml:1:41: axes.zip.eta: also an axis of product."),
        (
            "axes: {product: {sampler: [orig]}}\n",
            "s.yaml:1:28: axes.product.sampler[0]: 'orig' is not allowed. Allowed:",
        ),
        ("axes: {product: {sampler: [{beta: 1}]}}\n", "s.yaml:1:29: axes.product.sampler[0].beta: unknown key."),
        (
            "axes: {product: {eta: [0, 1]}, exclude: [{eta: 0.5}]}\n",
            "s.yaml:1:42: axes.exclude: matches no cell. Name values that product and zip have",
        ),
        (
            "axes: {product: {eta: [0]}, exclude: [{num_proposals: 5}]}\n",
            "s.yaml:1:40: axes.exclude[0].num_proposals: not an axis of product or zip. Allowed: eta.",
        ),
        ("axes: {product: {eta: [0]}, exclude: [{eta: 0}]}\n", "s.yaml:1:1: axes: no cell is left. Exclude fewer,"),
        (
            "axes: {product: {eta: [0]}, include: [{eta: 0}]}\n",
            "s.yaml:1:45: axes: the cell eta=0 seed=0 is there twice. Remove one of the two",
        ),
        ("axes: {include: [3]}\n", "s.yaml:1:18: axes.include[0]: 3 is not allowed. Allowed: a mapping from axis to"),
        (
            "measure: {score: false, latency: false, memory: false, flops: false}\n",
            "s.yaml:1:1: measure: nothing is measured. Set score, latency, memory, flops or training_step true",
        ),
        (
            "engine: torchvision\nmeasure: {training_step: true}\n",
            "s.yaml:2:1: measure.training_step: is not for engine torchvision. Allowed for: diffinst, original.",
        ),
        (
            "measure: {training_step_count: 0}\n",
            "s.yaml:1:32: measure.training_step_count: 0 is not allowed.",
        ),
        (
            "plots: [{x: seed, y: training_step_s/total}]\n",
            "s.yaml:1:22: plots[0].y: training_step_s/total is not measured. Set measure.training_step true, or take",
        ),
        ("tables: [{rows: seed}]\n", "s.yaml:1:10: tables[0]: needs columns, metric too"),
        ("tables: [null]\n", "s.yaml:1:10: tables[0]: null is not allowed."),
        ("tables: {rows: seed}\n", "s.yaml:1:9: tables: {rows: 'seed'} is not allowed. Allowed: a list of tables"),
        (
            "tables: [{rows: seed, columns: seed, metric: segm/AP}]\n",
            "s.yaml:1:32: tables[0].columns: the same axis as rows. Choose another one",
        ),
        (
            "tables: [{rows: seed, columns: eta, metric: segm/AP}]\n",
            "s.yaml:1:32: tables[0].columns: 'eta' is not allowed. Allowed: seed. It is a field, but no axis of this",
        ),
        (
            "tables: [{kind: long, metric: segm/AP}]\n",
            "s.yaml:1:23: tables[0].metric: unused in a table of kind long. Remove it",
        ),
        (
            "measure: {latency: false}\nplots: [{x: seed, y: latency_s/total}]\n",
            "s.yaml:2:22: plots[0].y: latency_s/total is not measured. Set measure.latency true, or take it out",
        ),
        ("plots: [{x: eta, y: flops}]\n", "s.yaml:1:13: plots[0].x: 'eta' is not allowed. Allowed: seed, a metric."),
    ],
)
def test_one_mistake_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    found = mistakes(tmp_path, text)
    assert len(found) == 1, found
    assert found[0].startswith(message), found[0]


def test_an_error_carries_its_place(tmp_path: Path) -> None:
    path = write(tmp_path, "sampler:\n  eta: 3\n")
    with pytest.raises(SuiteErrors) as caught:
        load_suite(path)
    error = caught.value
    assert (error.file, error.line, error.column, error.key) == (path, 2, 8, "sampler.eta")
    assert isinstance(error, SuiteError)


def test_a_missing_suite_names_those_that_are_there(tmp_path: Path) -> None:
    path = write(tmp_path, "name: x\n")
    with pytest.raises(SuiteErrors, match=r"cannot be read .*There: .*s\.yaml\. Did you mean '.*s\.yaml'"):
        load_suite(path.with_name("ss.yaml"))
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(SuiteErrors, match="not UTF-8 text"):
        load_suite(path)


def test_too_many_cells_are_refused_quickly(tmp_path: Path) -> None:
    values = list(range(1, 1001))
    found = mistakes(tmp_path, json.dumps({"axes": {"product": {"sampling_steps": values, "num_proposals": values}}}))
    assert found == ["s.yaml:1:2: axes: 1000000 combinations are too many cells. Allowed: at most 100000"]


# Suites that are wrong in random ways, made of right and wrong names and values.
NAMES_OF_KEYS = st.sampled_from(
    ["name", "preset", "data", "model", "sampler", "train", "axes", "seeds", "measure", "tables", "plots", "x"]
    + ["product", "zip", "include", "exclude", "eta", "seed", "backbone", "rows", "columns", "metric", "kind", "y"]
)
SCALARS = st.sampled_from([None, True, 0, 1, 0.5, "tiny", "released", "1e-4", "segm/AP", "eta", "long", "", "a b"])
WRONG_SUITES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES_OF_KEYS, inner, max_size=4),
    max_leaves=12,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(st.dictionaries(NAMES_OF_KEYS, WRONG_SUITES, max_size=5))
@example({"axes": {"product": None, "zip": {}, "include": None, "exclude": []}})
@example({"tables": [{}], "plots": [[]], "measure": None})
def test_any_content_is_a_suite_or_a_list_of_mistakes(tmp_path: Path, content: dict) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(content))
    try:
        suite = load_suite(path)
    except SuiteErrors:
        return
    assert suite.cells


# -- the suites of this project ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_committed_suites_are_valid_and_say_how_to_run_them(path: Path) -> None:
    suite = load_suite(path)
    assert suite.name == path.stem
    assert suite.description
    assert suite.tables
    assert suite.plots
    lines = suite.source_text.splitlines()
    assert lines[0].startswith(f"# run-suite suites/{path.name}")
    assert "hour" in lines[1]
    assert lines[2].startswith("# Expected: ")


def test_the_four_suites_have_the_axes_that_were_asked_for() -> None:
    cells = {path.stem: load_suite(path).cells for path in SUITES}
    assert {(c.axes["sampling_steps"], c.axes["num_proposals"]) for c in cells["quickstart"]} == {
        (steps, proposals) for steps in (1, 2, 4) for proposals in (20, 50, 100)
    }
    assert {(c.axes["sampling_steps"], c.axes["num_proposals"]) for c in cells["steps_x_proposals"]} == {
        (steps, proposals) for steps in (1, 2, 4, 8) for proposals in (100, 300, 500)
    }
    assert {c.config.data.class_agnostic for c in cells["coco_mini"]} == {False, True}
    assert {c.config.data.dataset for c in cells["nuclei"]} == {"nuclei"}
    released = cells["steps_x_proposals"][0].config
    assert released.train.matcher == "released"
    assert (released.train.batch_size, released.train.learning_rate, released.train.iterations) == (16, 2.5e-5, 450_000)


def test_the_suite_of_lvis_uses_what_lvis_needs() -> None:
    cells = load_suite(ROOT / "suites" / "lvis_tiny.yaml").cells
    for config in (cell.config for cell in cells):
        assert is_lvis(config.data.model_dump())
        assert config.train.federated_loss
        assert config.train.repeat_threshold is not None
        assert config.sampler.max_detections == 300


@pytest.mark.parametrize(
    ("data", "metric", "message"),
    [
        ("shapes", "segm/APr", "segm/APr is measured on LVIS annotations only. Take it out of the suite"),
        ("lvis", "bbox/AR100", "bbox/AR100 is measured on COCO annotations only. Take it out of the suite"),
    ],
)
def test_metrics_that_the_data_set_does_not_have(tmp_path: Path, data: str, metric: str, message: str) -> None:
    text = f"data: {{dataset: {data}}}\ntables: [{{kind: long, metrics: [segm/AP, {metric}]}}]\n"
    (found,) = mistakes(tmp_path, text)
    assert message in found
    both = f"axes: {{product: {{dataset: [coco, lvis]}}}}\ntables: [{{kind: long, metrics: [{metric}]}}]\n"
    assert len(load(tmp_path, both).cells) == 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("dataset: lvis, class_agnostic: true", "class_agnostic: not on LVIS, whose images are annotated for some of"),
        ("dataset: coco, annotation_format: lvis", "annotation_format: only with dataset: custom, but the dataset is"),
    ],
)
def test_settings_that_lvis_does_not_go_with(tmp_path: Path, data: str, message: str) -> None:
    (found,) = mistakes(tmp_path, f"data: {{{data}}}\n")
    assert message in found


def test_names_agree_with_the_catalogue_of_data_sets() -> None:
    assert set(DATASETS) == set(NAMES)
    assert set(CUSTOM_PATHS) <= set(Config().data.model_dump())


def test_names_agree_with_the_metrics_that_are_computed() -> None:
    for dataset in DATASETS:
        data = {"dataset": dataset, "annotation_format": "coco"}
        found = {name for name in metrics_of(data) if name.startswith(("segm/", "bbox/"))}
        assert found == set(metric_names(DataConfig(dataset=dataset)))
        assert is_lvis(data) == (annotation_format(DataConfig(dataset=dataset)) == "lvis")
    assert is_lvis({"dataset": "custom", "annotation_format": "lvis"})
