"""``lightning-rkd distill``: a pretrained teacher compressed into a small student, on data of one's own."""

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from lightning_rkd.cli.commands import common
from lightning_rkd.cli.distill.pretrained import POOLINGS
from lightning_rkd.cli.distill.report import describe_usage, format_table
from lightning_rkd.cli.distill.run import distill
from lightning_rkd.cli.distill.students import FORMS as STUDENTS
from lightning_rkd.cli.distill.teachers import FORMS

FILES = {
    "report.html": "table and pictures in one page for a browser",
    "table.md": "the table",
    "student/": "the exported student, with a model card",
    "projected/": "the student with its projection into the teacher's space, for a gallery of the teacher's",
    "held_out.safetensors": "embeddings of the held-out samples by both networks",
}


def main(args: Sequence[str]) -> None:
    """Run the command; the same command resumes, to the same table."""
    options = _parser().parse_args(args)
    console, given = common.new_console(), vars(options)
    with common.resumable("distill", args) as command, warnings.catch_warnings():
        warnings.filterwarnings("always", ".* does not align the student's space")
        warnings.showwarning = lambda message, *rest: console.print(f"warning: {message}", soft_wrap=True)
        teacher, student, data = (given.pop(name) for name in ("teacher", "student", "data"))
        given["formats"] = given["formats"].split(",")
        done = distill(teacher, student, data, **given, console=console, command=command)
    head, *rows = format_table(done.table)
    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    common.print_files(console, options.out, {name: x for name, x in FILES.items() if (options.out / name).exists()})
    console.print("Use it:")
    console.print(describe_usage(options.out, done.kind), markup=False, soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    teachers, students = (
        "\n".join(f"  {form}" + (f": {text}" if text else "") for form, text in forms.items())
        for forms in (FORMS, STUDENTS)
    )
    parser = common.new_parser(
        "distill",
        "Compress a pretrained teacher on your own images, texts or vectors, with or without labels: embed them with "
        "the teacher, train a small student on the embeddings, compare both on held-out samples and export the "
        "student. The same command resumes where it stopped.",
        f"""\
teachers:
{teachers}
students:
{students}
data: a folder of images (its folders are the classes), a table of texts (.csv, .tsv, .jsonl, .parquet),
      or an array (.npy, .safetensors)

examples:
  lightning-rkd distill --teacher timm:vit_small_patch14_dinov2 --data photos --unlabelled
  lightning-rkd distill --teacher sentence-transformers:all-MiniLM-L6-v2 --data questions.csv --minutes 5
  lightning-rkd distill --teacher embeddings:rows.npy --data photos --student resnet20 --minutes 10""",
    )
    add = parser.add_argument
    add("--teacher", required=True, metavar="SPEC", help="the teacher, in one of the forms below")
    add("--student", default="auto", metavar="SPEC", help="the student (default: auto)")
    add("--data", required=True, type=Path, metavar="PATH", help="samples to distil on")
    add("--test-data", type=Path, metavar="PATH", help="samples to test on (default: a fifth of --data is held out)")
    add("--labels", type=Path, metavar="FILE", help="labels of --data, one in each line, or .npy")
    add("--unlabelled", action="store_true", help="leave out the labels of --data")
    add("--text-column", default="text", metavar="NAME", help="column of the texts (default: text)")
    add("--label-column", metavar="NAME", help="column of the labels (default: none)")
    add("--skip-damaged", action="store_true", help="leave out images of --data that cannot be read")
    add("--pooling", choices=POOLINGS, help="pooling of tokens (default: mean, or cls for images)")
    default = "3 * RKD + CSD(student_temperature=T, teacher_temperature=T), T 0.05 for images and 0.1 otherwise"
    add("--loss", metavar="LOSS", help=f"an expression such as '2 * RKD + CSD' (default: {default}, by probes)")
    add("--embedding-dim", type=common.positive, metavar="D", help="width of the student (default: the teacher's)")
    add("--image-size", type=common.positive, metavar="N", help="pixels of the student's images (default: at most 64)")
    add("--parameters", type=common.positive, metavar="N", help="budget of parameters of --student auto")
    time = parser.add_mutually_exclusive_group()
    time.add_argument("--epochs", type=common.positive, metavar="N", help="epochs (default: 15, at least 1,500 steps)")
    time.add_argument("--minutes", type=float, metavar="M", help="time to train instead")
    add("--batch-size", type=common.positive, metavar="N", help="samples in a batch (default: 125; 120 texts)")
    add("--lr", type=float, metavar="RATE", help="largest learning rate (default: 1e-2; less for pretrained students)")
    precision = "bf16 with channels last (default: auto, where that is faster)"
    add("--precision", choices=("auto", "32", "bf16"), default="auto", help=precision)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="processor (default: a GPU if there is one)")
    add("--seed", type=int, default=0, metavar="N", help="seed (default: 0)")
    add("--formats", default="safetensors,onnx", metavar="LIST", help="formats of the student (default: %(default)s)")
    out = "output folder (default: runs/distill)"
    add("--out", type=Path, default=Path("runs/distill"), metavar="FOLDER", help=out)
    return parser
