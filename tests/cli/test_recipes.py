"""Every recipe runs through the real command line, says what it is, and fits its neighbours."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from lightning_rkd.cli import main as cli
from lightning_rkd.cli import recipes
from lightning_rkd.cli.trainer import import_public_classes
from lightning_rkd.data import GlyphDataModule
from lightning_rkd.losses import RelationalLoss
from tests.harness.replicas import photos, replica

TINY = [
    "--data.eval_batch_size=64",
    "--data.batches_per_epoch=2",
    "--trainer.max_epochs=2",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.limit_val_batches=1",
]
GLYPHS = ["--data.max_classes=20", "--data.image_size=12", "--data.classes_per_batch=4"]
EPISODES = {"few_shot": {"class_path": "FewShotAccuracy", "init_args": {"ways": 2, "queries": 2, "episodes": 9}}}
FOLDER = ["--data.root=images", "--data.image_size=12", "--data.classes_per_batch=4", "--data.samples_per_class=2"]


REPLICAS = {
    "CUBDataModule": ("cub", 12, 6),
    "CarsDataModule": ("cars", 12, 6),
    "OnlineProductsDataModule": ("online_products", 24, 6),
    "CIFARDataModule": ("cifar100", 12, 6),
    "TinyImageNetDataModule": ("tiny_imagenet", 12, 6),
    "OmniglotDataModule": ("omniglot", 2, 20),
    "MiniImageNetDataModule": ("mini_imagenet", 18, 20),
}
"""Of the published data sets: name, classes and images of a class; episodes need many."""


def loaded(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((recipes.FOLDER / f"{name}.yaml").read_text())
    return config


def data_of(name: str) -> str:
    module: str = loaded(name)["data"]["class_path"]
    return module


OURS = [name for name in recipes.names() if data_of(name) not in REPLICAS]
PUBLISHED = [name for name in recipes.names() if data_of(name) in REPLICAS]


def miniature(name: str) -> list[str]:
    """Options that let the recipe take a step on a replica of its data set, with networks that start at random."""
    model = loaded(name)["model"]["init_args"]
    untrained: dict[str, Any] = {}
    if "teacher" in model:
        untrained["teacher"] = {"init_args": {"weights": None}}
    if "weights" in model.get("student", {}).get("init_args", {}):
        untrained["student"] = {"init_args": {"weights": None}}
    Path("untrained.yaml").write_text(yaml.safe_dump({"model": {"init_args": untrained}}))
    kind, classes, images = REPLICAS[data_of(name)]
    root = Path.cwd().parent / f"replica-{kind}"  # shared by the tests of a session
    if not root.exists():
        replica(kind, root, classes, images)
    options = ["--config=untrained.yaml", "--trainer.fast_dev_run=true", "--trainer.accelerator=cpu"]
    options += [f"--data.root={root}", "--data.check=false", "--data.num_workers=0"]
    options += [f"--data.eval_batch_size={500 if images > 6 else 48}"]  # episodes need many
    options += ["--data.classes_per_batch=2", "--data.samples_per_class=4"]
    if data_of(name) in ("CUBDataModule", "CarsDataModule", "OnlineProductsDataModule"):
        options += ["--data.image_size=36", "--data.crop_size=32", "--data.validation=0.34"]
    if data_of(name) in ("CIFARDataModule", "TinyImageNetDataModule"):
        options += ["--data.validation=0.2"]
    return options


def tiny(name: str, weights: bool = False) -> list[str]:
    """Options that make the recipe small and, but for ``weights``, independent of what other runs leave."""
    options = list(TINY)
    if "teacher" in loaded(name)["model"]["init_args"] and not weights:
        untrained = {"model": {"init_args": {"teacher": {"init_args": {"weights": None}}}}}
        Path("untrained.yaml").write_text(yaml.safe_dump(untrained))
        options.append("--config=untrained.yaml")
    if "few_shot" in loaded(name)["model"]["init_args"].get("metrics", {}):
        Path("episodes.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"metrics": EPISODES}}}))
        options.append("--config=episodes.yaml")
    if data_of(name) == "GlyphDataModule":
        return options + GLYPHS
    if not Path("images").exists():
        photos(Path("images"), images=12, size=12)
    return options + FOLDER


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_of_a_published_data_set_takes_a_step_on_a_replica(name: str) -> None:
    options = miniature(name)
    if name.endswith("mhgd_student"):  # reads what its first stage left
        estimator = name.replace("student", "estimator")
        stage = [o for o in options if "fast_dev_run" not in o]
        stage += ["--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false"]
        assert cli.main(["fit", "--config", estimator, *stage]) == 0
    assert cli.main(["fit", "--config", name, *options]) == 0


def test_metric_learning_recipes_differ_by_their_data_alone() -> None:
    for role in ("resnet50", "resnet50_resnet18", "resnet50_self"):
        cub, cars = loaded(f"cub_{role}"), json.loads(json.dumps(loaded(f"cars_{role}")).replace("cars_", "cub_"))
        assert cars["data"].pop("class_path") != cub["data"].pop("class_path")
        assert cars["data"]["init_args"].pop("root") != cub["data"]["init_args"].pop("root")
        assert cars == cub


def test_pairs_of_one_table_differ_by_their_networks_alone() -> None:
    found = []
    for teacher, student in PAIRS.items():
        for name in (f"cifar100_{teacher}", f"cifar100_{teacher}_{student}"):
            config = loaded(name)
            model = config["model"]["init_args"]
            assert config["trainer"].pop("default_root_dir") == f"runs/{name}"
            assert model.pop("student")["init_args"]["num_classes"] == 100
            for key in ("teacher", "student_layer", "teacher_layer"):
                model.pop(key, None)
            loss = model.pop("loss", None)
            assert loss is None or loss["init_args"] == {"distance_weight": 25.0, "angle_weight": 50.0}
            found.append(config)
    assert all(config == found[0] for config in found)


@pytest.mark.parametrize("name", ["glyphs_fewshot_teacher", "glyphs_rkd_fewshot"])
def test_glyphs_have_the_images_that_the_episodes_of_a_recipe_draw(name: str) -> None:
    config = loaded(name)
    data = GlyphDataModule(**config["data"]["init_args"])
    data.setup()
    sizes = torch.bincount(data.root.labels[data.val_set.indices])
    few = config["model"]["init_args"]["metrics"]["few_shot"]["init_args"]
    assert int(sizes[sizes > 0].min()) >= few["shots"] + few["queries"]
    assert int((sizes > 0).sum()) >= few["ways"]


PAIRS = {"resnet32x4": "resnet8x4", "wrn40_2": "wrn16_2", "resnet56": "resnet20", "vgg13": "vgg8"}


WIDTHS = [f"--model.student.init_args.embedding_dim={dim}" for dim in (16, 64)]


def table(name: str) -> dict[str, list[str]]:
    """Options for the other rows of RepDistiller's table, from the header of a recipe, by loss."""
    lines = (recipes.FOLDER / f"{name}.yaml").read_text().splitlines()
    rows = [shlex.split(line.removeprefix("#")) for line in lines if line.startswith("#   --model.loss")]
    return {row[1]: row for row in rows}


PAIR = "cifar100_resnet56_resnet20"


@pytest.mark.parametrize("name", [f"cifar100_{teacher}_{student}" for teacher, student in PAIRS.items()])
def test_rows_of_the_table_read_the_layers_of_repdistillers_code(name: str) -> None:
    layers = loaded(name)["model"]["init_args"]["student_layer"]["feature_maps"]
    maps = [layer.removeprefix("backbone.") for layer in layers]
    features = [*([] if "vgg" in name else ["stem"]), *maps, "pool"]  # of their VGG the first is the first stage
    import_public_classes()
    parser, read = ArgumentParser(exit_on_error=False), {}
    parser.add_subclass_arguments(RelationalLoss, "loss")
    for short, row in table(name).items():
        options = [option.replace("--model.", "--") for option in row]
        loss = parser.instantiate(parser.parse_args(options[: options.index("--weight")])).loss
        if loss.reads == "feature_maps":
            read[short] = maps if loss.feature_maps is None else [maps[p] for p in loss.feature_maps]
    assert read == {
        "FitNetHint": [features[2]],
        "AttentionTransfer": features[1:-1],
        "NST": features[1:-1],
        "SimilarityPreserving": [features[-2]],
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [(PAIR, table(PAIR)[loss]) for loss in ("CRD", "FitNetHint", "SoftTarget")]
    + [("cifar100_vgg13_vgg8", table("cifar100_vgg13_vgg8")["AttentionTransfer"])]
    + [("cub_resnet50_resnet18", [width]) for width in WIDTHS],
)
def test_other_losses_and_students_of_other_widths_are_a_few_options_away(name: str, options: list[str]) -> None:
    assert cli.main(["fit", "--config", name, *miniature(name), *options]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_recipe_fits_and_tests(name: str, tmp_path: Path) -> None:
    if name.endswith("mhgd_student"):  # reads what its first stage left
        estimator = name.replace("student", "estimator")
        assert cli.main(["fit", "--config", estimator, *tiny(estimator)]) == 0
    assert cli.main(["fit", "--config", name, *tiny(name)]) == 0
    checkpoint = Path(loaded(name)["trainer"]["default_root_dir"]) / "last.ckpt"
    state = torch.load(checkpoint, weights_only=True)
    assert state["global_step"] == 4
    assert not [key for key in state["state_dict"] if key.startswith("teacher") or ".network." in key]
    assert cli.main(["test", "--config", name, *tiny(name), "--ckpt_path", str(checkpoint)]) == 0
    measured = list(tmp_path.glob("runs/*/lightning_logs/*/metrics.csv"))
    assert any("test/" in path.read_text() for path in measured)


@pytest.mark.parametrize("name", recipes.names())
def test_recipe_says_what_it_does_how_long_it_takes_and_how_to_run_it(name: str) -> None:
    text = (recipes.FOLDER / f"{name}.yaml").read_text()
    header = text[: text.index("\nseed_everything")]
    assert all(line.startswith("#") for line in header.splitlines())
    words = " ".join(header.replace("\n#", " ").split())
    assert recipes.about(name).endswith(".")
    assert "minute" in words or "has not been measured" in words
    assert f"lightning-rkd fit --config {name}" in header
    assert f"--ckpt_path runs/{name}/last.ckpt" in header


@pytest.mark.parametrize("name", recipes.names())
def test_recipe_ends_its_schedule_with_its_epochs(name: str) -> None:
    config = loaded(name)
    if scheduler := config["model"]["init_args"].get("lr_scheduler"):
        epochs, settings = config["trainer"]["max_epochs"], scheduler["init_args"]
        if "total_steps" in settings:
            assert settings["total_steps"] == epochs * config["data"]["init_args"]["batches_per_epoch"]
        else:
            assert max(settings.get("milestones", [settings.get("step_size")])) < epochs
    assert config["trainer"]["default_root_dir"] == f"runs/{name}"


def test_distilled_student_and_student_alone_differ_by_the_teacher_only() -> None:
    alone, distilled, teacher = (loaded(f"glyphs_{name}") for name in ("student", "rkd", "teacher"))
    learned = distilled["model"]["init_args"].pop("teacher")["init_args"]
    distilled["model"]["init_args"].pop("loss")
    for config in (alone, distilled):
        config["trainer"].pop("default_root_dir")
    assert alone == distilled
    assert learned["network"] == teacher["model"]["init_args"]["student"]
    assert learned["weights"] == f"{teacher['trainer']['default_root_dir']}/last.ckpt"


@pytest.mark.parametrize("name", recipes.names())
def test_recipe_describes_its_teacher_as_the_teachers_own_recipe_does(name: str) -> None:
    teacher = loaded(name)["model"]["init_args"].get("teacher")
    if teacher is not None:
        folder = Path(teacher["init_args"]["weights"]).parent
        theirs = loaded(folder.name)
        assert theirs["trainer"]["default_root_dir"] == str(folder)
        student, network = theirs["model"]["init_args"]["student"], teacher["init_args"]["network"]
        if "weights" in network["init_args"]:  # the checkpoint fills what ImageNet filled before
            assert network["init_args"].pop("weights") is None
            assert student["init_args"].pop("weights") == "IMAGENET1K_V1"
        assert student == network
        assert theirs["data"]["init_args"].get("split_seed") == loaded(name)["data"]["init_args"].get("split_seed")
        assert theirs["data"]["init_args"].get("split_by") == loaded(name)["data"]["init_args"].get("split_by")
