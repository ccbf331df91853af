"""Distillation of a pretrained teacher on data of one's own, from specifications or objects to an exported student."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from rich.console import Console

from lightning_rkd import __version__
from lightning_rkd.cli.commands.common import begin, check_folder
from lightning_rkd.cli.distill import networks, report
from lightning_rkd.cli.distill.data import StudentInputs
from lightning_rkd.cli.distill.decisions import decide
from lightning_rkd.cli.distill.embedding import divide_rows, embed_all
from lightning_rkd.cli.distill.losses import check_reads, choose_loss, describe_loss, find_projection, parse_loss
from lightning_rkd.cli.distill.parts import split_rows
from lightning_rkd.cli.distill.samples import Kind, read_samples
from lightning_rkd.cli.distill.scores import HELD_OUT, compare_networks
from lightning_rkd.cli.distill.teachers import open_teacher
from lightning_rkd.cli.distill.training import Plan, make_tensors, plan_training, train_student
from lightning_rkd.export.card import Facts
from lightning_rkd.export.write import check_formats
from lightning_rkd.losses.weighting import Weighable
from lightning_rkd.models.heads import count_parameters

MADE_BY = "distill.yaml"
"""File with the settings of a distillation in its output folder; a folder that holds the same settings is resumed."""

BATCH_SIZES: dict[Kind, int] = {"image": 125, "text": 120, "vector": 125}
RATES = {"torchvision": 1e-3, "timm": 1e-3, "hf": 1e-4, "sentence-transformers": 1e-4}
"""Largest learning rates of students that are pretrained; 1e-2 for the others."""


@dataclass(frozen=True)
class Distilled:
    """Result of a distillation.

    Attributes:
        folder: The output folder.
        student: The exported student, ready to use: it takes a list of images or texts, or a tensor.
        table: A row for the teacher and one for the student, by column.
        loss: The loss as an expression.
        split: How the samples were divided.
        kind: Kind of the samples.
    """

    folder: Path
    student: Any
    table: Sequence[Mapping[str, Any]]
    loss: str
    split: str
    kind: Kind


def distill(
    teacher: Any,
    student: Any,
    data: Any,
    *,
    test_data: Any = None,
    labels: Any = None,
    unlabelled: bool = False,
    text_column: str = "text",
    label_column: str | None = None,
    skip_damaged: bool = False,
    pooling: str | None = None,
    loss: str | Weighable | None = None,
    embedding_dim: int | None = None,
    image_size: int | None = None,
    parameters: int | None = None,
    epochs: int | None = None,
    minutes: float | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    precision: Literal["auto", "32", "bf16"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    seed: int = 0,
    formats: Sequence[str] = ("safetensors", "onnx"),
    out: str | Path = "runs/distill",
    console: Console | None = None,
    command: str = "",
) -> Distilled:
    """Compress a pretrained teacher on data of one's own: train a student on its embeddings, evaluate and export it.

    The same call goes on where an earlier one stopped, to the same result.

    Args:
        teacher: A specification such as ``"timm:vit_small_patch14_dinov2"`` (see ``lightning-rkd distill --help``), a
            function from a list of samples to embeddings (N, D), a network whose attribute ``transform`` turns a sample
            into its input, or an array with a row for each sample of ``data`` and then of ``test_data``.
        student: ``"auto"``, a specification, a network, which may have an attribute ``preprocess`` (a
            :class:`~lightning_rkd.export.Preprocess`), or a :class:`Student`.
        data: A folder of images, a table with a column of texts, an array (N, D), their path, or a list of PIL images
            or strings.
        test_data: Data of the same kind that are evaluated on; ``None`` holds out a fifth of ``data``.
        labels: File of labels, or labels, one for each sample of ``data``. They divide the samples by class and serve
            to evaluate; losses that need labels read them too.
        unlabelled: Leave out the labels of ``data``, not those of ``test_data``.
        text_column: Column of the texts in a table.
        label_column: Column of the labels in a table.
        skip_damaged: Leave out images of a folder that cannot be read; the log lists them.
        pooling: Pooling of the token outputs of transformers: ``"mean"``, ``"cls"``, ``"last"`` or ``"pooler"``.
            ``None`` averages the tokens, except for images where there is a class token, and takes the embedding that
            images and texts share of networks such as CLIP.
        loss: A loss, or an expression such as ``"3 * RKD + CSD(student_temperature=0.1)"``. ``None`` takes 3 RKD-DA +
            CSD, with temperatures of 0.05 for images and 0.1 otherwise, which stem from probes with two teachers.
        embedding_dim: Width of the student's embeddings; ``None`` is the teacher's. With another width the projection
            to the teacher's space is trained along, and exported into ``projected``.
        image_size: Height and width of the student's images; ``None`` is the median of the images', at most 64.
        parameters: Budget of parameters of ``"auto"``.
        epochs: Number of epochs; ``None`` takes 15, or as many as make 1,500 steps.
        minutes: Time to train, from which the number of epochs is computed.
        batch_size: Samples in a batch; ``None`` takes 125, or 120 texts.
        lr: Largest learning rate of the one-cycle schedule of AdamW; ``None`` takes 1e-2, and 1e-3 or 1e-4 for
            students that are pretrained.
        precision: ``"auto"`` trains with bf16 autocast and channels last where a short measurement finds that faster.
        device: ``"auto"`` takes a GPU if there is one.
        seed: Seed of the split, the student and the order.
        formats: Formats of the exported student.
        out: Output folder.
        console: Console of rich for messages and progress; ``None`` prints nothing.
        command: The command that the report names.

    Raises:
        FileNotFoundError: Data or files of the teacher that do not exist.
        ValueError: A specification that cannot be read, embeddings that do not fit the data or hold NaN, fewer samples
            than a batch, or a device that is not there.
        FileExistsError: The output folder holds something else, or a distillation with other settings.
    """
    console = Console(quiet=True) if console is None else console
    if epochs is not None and minutes is not None:
        raise ValueError("give epochs or minutes, not both")
    given = {"epochs": epochs, "minutes": minutes, "batch_size": batch_size, "lr": lr}
    for name, number in given.items():
        if number is not None and number <= 0:
            raise ValueError(f"{name} must be positive, got {number}")
    folder = Path(out)
    check_folder(folder, MADE_BY, "distillation")
    check_formats(formats)
    place = _find_device(device)
    columns = (text_column, label_column, skip_damaged)
    samples = read_samples(data, labels, unlabelled, *columns)
    test = None if test_data is None else read_samples(test_data, None, False, *columns)
    if test is not None and test.kind != samples.kind:
        raise ValueError(f"test_data are of kind {test.kind}, and data of kind {samples.kind}")
    parts = split_rows(samples, test is None, seed)
    batch_size = batch_size or BATCH_SIZES[samples.kind]
    if len(parts.train) < batch_size:
        raise ValueError(
            f"{len(parts.train)} training samples are fewer than a batch of {batch_size}: give more data, or a smaller "
            "batch_size (--batch-size)"
        )
    chosen = choose_loss(samples.kind) if loss is None else parse_loss(loss) if isinstance(loss, str) else loss
    check_reads(chosen)
    described = describe_loss(chosen)
    with isolate_rng(include_cuda=False):
        torch.manual_seed(seed)  # a teacher of random weights is the same when the command resumes
        source = open_teacher(teacher, samples.kind, pooling, place)
    if source.rows is not None:
        divide_rows(source, samples, test)  # before the folder is begun
    rate = lr or RATES.get(student.partition(":")[0] if isinstance(student, str) else "", 1e-2)
    settings = {
        "made_by": "lightning-rkd distill",
        "lightning_rkd": __version__,
        "torch": str(torch.__version__),
        "teacher": f"{source.name} {source.key}" + (f", pooling {pooling}" if pooling else ""),
        "student": networks.identify_student(student),
        "data": f"{samples.describe()}, {samples.fingerprint}",
        "test_data": None if test is None else f"{test.describe()}, {test.fingerprint}",
        "loss": described,
        "embedding_dim": embedding_dim,
        "image_size": image_size,
        "parameters": parameters,
        "epochs": epochs,
        "minutes": minutes,
        "batch_size": batch_size,
        "lr": rate,
        "precision": precision,
        "seed": seed,
    }
    tests = f"{len(parts.test):,} held out" if test is None else f"and {test.describe()} to test"
    console.print(
        f"Data: {samples.describe()}, divided {parts.how}: {len(parts.train):,} samples to train, "
        f"{len(parts.validation):,} to validate, {tests}.",
        soft_wrap=True,
    )
    console.print(f"Teacher: {source.describe()}.", markup=False, soft_wrap=True)
    if source.rows is not None and samples.kind != "vector":
        order = (
            f"Embeddings are taken in the order of the data: {samples.name(0)}, to {samples.name(len(samples) - 1)}."
        )
        console.print(order, markup=False, soft_wrap=True)
    few = source.embed_few(samples.fetch(range(2)))  # for the width
    with isolate_rng(include_cuda=False):
        torch.manual_seed(seed)
        width = embedding_dim or few.shape[1]
        made = networks.make_student(student, samples, width, image_size, parameters, parts.train)
        inputs = StudentInputs(samples, made.preprocess, seed)
        make_tensors(chosen, made.network, inputs, few)
        try:
            resumed = begin(folder, MADE_BY, settings, "distillation")
        except FileExistsError as error:
            error.add_note(
                f"(with --out, --teacher embeddings:{folder} takes the teacher's embeddings of the same data)"
            )
            raise
        if resumed:
            console.print(f"Resuming the distillation in {folder}.", soft_wrap=True)
        if find_projection(chosen) is None:
            warnings.warn(
                f"{described} does not align the student's space with the teacher's, so the student cannot search a "
                "gallery of the teacher; add a loss that does, such as CSD",
                stacklevel=2,
            )
        teacher_rows, test_rows = embed_all(source, samples, test, folder, precision, console)
        measure = partial(
            plan_training, made.network, chosen, inputs, teacher_rows, parts.train, batch_size=batch_size,
            device=place, precision=precision, epochs=epochs, minutes=minutes,
        )  # fmt: skip
        plan = Plan(**decide(folder, "plan", measure))
        training = f"Loss: {described}. AdamW, batches of {batch_size}, learning rate up to {rate:g}."
        console.print(f"Student: {made.describe()}.\n{training}", markup=False, soft_wrap=True)
        train_student(
            made.network, chosen, teacher_rows, inputs, parts.train, parts.validation, folder / "training", plan,
            batch_size=batch_size, lr=rate, seed=seed, device=place, console=console,
        )  # fmt: skip
    apart = embedding_dim is not None  # the student keeps its own space
    trained, align = networks.finish_student(made, chosen, apart)
    held, rows = (samples, parts.test) if test is None else (test, list(range(len(test))))
    target = teacher_rows[rows] if test_rows is None else test_rows
    size = count_parameters(made.network)
    compare = partial(compare_networks, source, trained, align, size, held, rows, target, folder / HELD_OUT)
    table = decide(folder, "table", compare)
    scores = {name: x for name, x in table[1].items() if isinstance(x, float) and name != "ms"}
    origin = f"{samples.describe()}, divided {parts.how}"
    facts = Facts(made.description, origin, source.name, described, scores, f"On {len(rows):,} held-out samples.")
    exported = networks.export_student(made, chosen, apart, folder, samples, formats, facts)
    about = f"A student, {made.describe()}, learned from {source.name} on {samples.describe()}."
    notes = [training, f"The samples were divided {parts.how}."]
    report.write_report(folder, table, notes, held, about=about, command=command)
    return Distilled(folder, exported, table, described, parts.how, samples.kind)


def _find_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda': there is no GPU that PyTorch can use; take 'cpu', or 'auto'")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'auto', 'cpu' or 'cuda', got {device!r}")
    return device
