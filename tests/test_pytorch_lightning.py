"""pytorch_lightning, a package of its own beside lightning: its Trainer, its command line, and processes with both."""

import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as ptl
import torch
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_rkd.modules.pytorch_lightning
from lightning_rkd.callbacks.distillation import RelationalDistillation
from lightning_rkd.callbacks.figures import Pictures
from lightning_rkd.callbacks.retrieval import RetrievalEvaluation
from lightning_rkd.data import GlyphDataModule
from lightning_rkd.distillation.layers import LayerNotFoundError
from lightning_rkd.losses.rkd import RKD
from lightning_rkd.modules.distillation import DistillationModule as LightningDistillationModule
from lightning_rkd.modules.pytorch_lightning import DistillationModule
from tests.harness import toys
from tests.harness.forks import run_code

ROOT = Path(__file__).parents[1]


class Student(ptl.LightningModule):
    """An ordinary module of pytorch_lightning; ``by_hand`` is a function of (embedding, inputs) that its step adds."""

    def __init__(self, by_hand: Any = None, manual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head = toys.Backbone(), nn.Linear(5, toys.CLASSES)
        self.by_hand, self.automatic_optimization = [by_hand], not manual

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        embedding = self.backbone(x)
        loss = F.cross_entropy(self.head(embedding), y)
        if self.by_hand[0] is not None:
            loss = loss + self.by_hand[0](embedding, x)
        if self.automatic_optimization:
            return loss
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        return optimizer.step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.backbone(batch[0])

    def configure_optimizers(self) -> Any:
        return toys.sgd(self.parameters())


def trainer(*callbacks: Any, **settings: Any) -> ptl.Trainer:
    """One CPU, one epoch, and nothing on the screen or on the disk."""
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return ptl.Trainer(**{"accelerator": "cpu", "max_epochs": 1, "callbacks": [*callbacks], **off, **settings})


def weights(module: Any) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in module.state_dict().items()}


@pytest.mark.scenario("loops", "pytorch_lightning, the callback")
@pytest.mark.parametrize("manual", [False, True])
def test_the_callback_trains_as_the_loss_by_hand(manual: bool, difference: Callable[..., None]) -> None:
    teacher = toys.teacher().eval()
    trained = []
    for by_hand in (lambda embedding, x: RKD()(embedding, teacher(x).detach()), None):
        module = Student(by_hand, manual)
        callback = RelationalDistillation(teacher, RKD(), student_layer="backbone")
        run = trainer(*([callback] if by_hand is None else []))
        run.fit(module, toys.loader())
        trained.append(weights(module))
    assert "distill/rkd" in run.callback_metrics
    difference(toys.largest_gap(*trained), limit=1e-6 * manual)  # 0 in automatic optimisation
    assert toys.largest_gap(trained[0], weights(Student())) > 0.01
    assert toys.attachments(module) == []


def test_retrieval_is_evaluated_as_in_lightning() -> None:
    found = []
    for module, start in ((Student(), trainer), (toys.Evaluated(), toys.trainer)):
        run = start(callbacks=[RetrievalEvaluation("backbone")])
        found += run.validate(module, toys.loader(), verbose=False)
    assert set(found[0]) >= {"val/recall_at_1", "val/map_at_r"}
    assert found[0] == found[1]


@pytest.mark.scenario("loops", "pytorch_lightning, configure_model")
def test_layers_that_configure_model_makes_can_be_tapped() -> None:
    class Late:
        def configure_model(self) -> None:
            if not hasattr(self, "backbone"):  # it is called more than once
                self.backbone = toys.Backbone()

    for kind, start in ((Student, trainer), (toys.Student, toys.trainer)):
        module = type("Late", (Late, kind), {})()
        for layer in ("backbone", "bakcbone"):
            del module.backbone
            run = start(callbacks=[RelationalDistillation(toys.teacher(), RKD(), student_layer=layer)])
            with nullcontext() if layer == "backbone" else pytest.raises(LayerNotFoundError, match="bakcbone"):
                run.fit(module, toys.loader())
            assert ("distill/rkd" in run.callback_metrics) is (layer == "backbone")


@pytest.mark.scenario("loops", "pytorch_lightning, the module")
def test_the_module_trains_as_that_for_lightning(difference: Callable[..., None]) -> None:
    trained, values = [], []
    for cls, start in ((DistillationModule, trainer), (LightningDistillationModule, toys.trainer)):
        torch.manual_seed(0)
        module = cls(toys.Backbone(), toys.teacher(), RKD(), optimizer=toys.sgd)
        run = start()
        run.fit(module, toys.loader())
        trained.append(weights(module))
        values.append({name: float(x) for name, x in run.callback_metrics.items()})
    difference(toys.largest_gap(*trained), limit=0.0)
    assert values[0] == values[1]
    assert set(values[0]) == {"train/loss", "distill/rkd"}


@pytest.mark.parametrize("name", lightning_rkd.modules.pytorch_lightning.__all__)
def test_every_module_of_the_package_exists_for_it(name: str) -> None:
    cls = getattr(lightning_rkd.modules.pytorch_lightning, name)
    assert issubclass(cls, ptl.LightningModule)
    assert not issubclass(cls, LightningDistillationModule)
    assert cls.__module__.startswith("lightning_rkd.modules.pytorch_lightning.")
    assert f"class {name}(" in inspect.getsource(cls)
    assert name in dir(lightning_rkd.modules.pytorch_lightning)


def test_the_list_of_modules_is_complete() -> None:
    import lightning.pytorch as pl

    every = {name: getattr(lightning_rkd.modules, name) for name in lightning_rkd.modules.__all__}
    modules = {name for name, cls in every.items() if issubclass(cls, pl.LightningModule)}
    assert set(lightning_rkd.modules.pytorch_lightning.__all__) == modules


def test_figures_are_logged_with_its_loggers(tmp_path: Path) -> None:
    module = DistillationModule(toys.Backbone(), toys.teacher(), RKD(), optimizer=toys.sgd)
    run = trainer(Pictures(samples=16), logger=CSVLogger(tmp_path, name="", version=""))
    run.fit(module, toys.loader(), toys.loader())
    drawn = {path.name.partition("-")[0] for path in tmp_path.rglob("*.png")}
    assert drawn == {"distances", "angles"}
    trainer(Pictures(samples=16), logger=True, fast_dev_run=True).fit(module, toys.loader(), toys.loader())


CONFIG = """
model:
  class_path: lightning_rkd.modules.pytorch_lightning.DistillationModule
  init_args:
    student: &net
      class_path: tests.harness.nets.Perceptron
    task_loss: {class_path: torch.nn.CrossEntropyLoss}
    optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}
data:
  class_path: lightning_rkd.data.GlyphDataModule
  init_args: {max_classes: 12, image_size: 12, classes_per_batch: 4, samples_per_class: 3, batches_per_epoch: 2}
trainer:
  accelerator: cpu
  max_epochs: 1
  use_distributed_sampler: false
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_rkd.RelationalDistillation
      init_args:
        teacher: *net
        loss: {class_path: lightning_rkd.RKD, init_args: {distance_weight: 2.0}}
        student_layer: student
    - class_path: lightning_rkd.RetrievalEvaluation
      init_args: {layer: student, metric: {class_path: lightning_rkd.EmbeddingRetrieval}}
"""


def test_its_command_line_takes_callbacks_modules_and_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(CONFIG)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config=run.yaml"])
    cli = LightningCLI(run=False, seed_everything_default=0, save_config_callback=None)
    assert isinstance(cli.model, DistillationModule)
    assert isinstance(cli.datamodule, GlyphDataModule)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert {"distill/rkd", "train/task", "val/recall_at_1"} <= set(cli.trainer.callback_metrics)
    (path,) = tmp_path.rglob("*.ckpt")
    again = DistillationModule.load_from_checkpoint(path, weights_only=True)
    assert toys.largest_gap(weights(again), weights(cli.model)) == 0, "rebuilt from the configuration alone"
    Path("run.yaml").write_text(CONFIG.replace("lightning_rkd.modules.pytorch_lightning.", "lightning_rkd."))
    with pytest.raises(SystemExit):
        LightningCLI(run=False)
    assert "lightning_rkd.DistillationModule" in capsys.readouterr().err


BOTH = """
import pickle, sys
{first}
from lightning_rkd import RKD, RelationalDistillation
from tests.harness import toys
from tests.test_pytorch_lightning import Student, trainer
found = []
for module, start in ((Student(), trainer), (toys.Student(), toys.trainer)):
    run = start(callbacks=[RelationalDistillation(toys.teacher(), RKD(), student_layer="backbone")])
    run.fit(module, toys.loader())
    found.append(float(run.callback_metrics["distill/rkd"]) > 0)
loaded = pickle.load(open(sys.argv[1], "rb"))
print(found, type(run).__module__.partition(".")[0], type(loaded).__mro__[1].__module__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("first", ["import pytorch_lightning", "pickle.load(open(sys.argv[1], 'rb'))"])
def test_both_packages_work_in_one_process_in_either_order(first: str, tmp_path: Path) -> None:
    path = tmp_path / "module"
    path.write_bytes(pickle.dumps(DistillationModule(nn.Linear(2, 2), nn.Linear(2, 2), RKD())))
    code = "import warnings; warnings.simplefilter('ignore')" + BOTH.format(first=first)
    if first.startswith("import"):
        output = subprocess.check_output([sys.executable, "-c", code, str(path)], cwd=ROOT, text=True)
    else:  # a fork has imported lightning
        output = run_code(code, str(path))
    assert output.splitlines()[-1] == "[True, True] lightning pytorch_lightning.core.module"
