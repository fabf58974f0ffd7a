"""Files that are known to be hostile, each a change to a valid folder. They go before the random
mutations of their reader.
"""

import base64
import json
import os
import pickle
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fuzz.mutations import DEEP, PICTURES, dump
from hipp_ext.files.sealed import ENTRY

Edit = Callable[[Path], object]
CORPUS: dict[str, dict[str, Edit]] = {}
PYTHON = "import os\nos.system('touch /tmp/fuzz-was-here')\nclass Evil:\n    pass\n"


def corpus(name: str) -> list[tuple[str, Edit]]:
    """(what it is, how it is made) of a reader's known hostile files."""
    return list(CORPUS.get(name.removesuffix("-forged"), {}).items())


def known(readers: str, what: str, edit: Edit) -> None:
    """Put `edit` into the corpus of the readers that are named, with blanks between them."""
    for name in readers.split():
        CORPUS.setdefault(name, {})[what] = edit


def setting(pattern: str, *path: Any, value: Any) -> Edit:
    """In every JSON file that `pattern` finds, the value at `path` becomes `value`."""

    def edit(folder: Path) -> None:
        for file in sorted(folder.glob(pattern)):
            data = json.loads(file.read_bytes())
            inner = data
            for key in path[:-1]:
                inner = inner.setdefault(key, {}) if isinstance(inner, dict) else inner[key]
            inner[path[-1]] = value
            file.write_bytes(dump(data))

    return edit


def text(pattern: str, content: bytes | Callable[[bytes], bytes]) -> Edit:
    """Every file that `pattern` finds gets other content; where there is none, a file of this name
    is made.
    """

    def edit(folder: Path) -> None:
        for file in sorted(folder.glob(pattern)) or [folder / pattern]:
            file.write_bytes(content if isinstance(content, bytes) else content(file.read_bytes()))

    return edit


def first_group(change: Mapping[str, Any]) -> Edit:
    """In a planner's signals, the first group gets other fields; the digest stays."""

    def edit(folder: Path) -> None:
        for file in sorted(folder.glob("planner/signals.safetensors")):
            data = file.read_bytes()
            end = 8 + int.from_bytes(data[:8], "little")
            header = json.loads(data[8:end])
            entry = json.loads(header["__metadata__"][ENTRY])
            entry["about"]["signals"]["groups"][0] |= change
            header["__metadata__"][ENTRY] = json.dumps(entry)
            text = json.dumps(header).encode()
            file.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])

    return edit


def both(*edits: Edit) -> Edit:
    return lambda folder: [edit(folder) for edit in edits]


def in_rows(name: str, value: Any) -> Callable[[bytes], bytes]:
    """JSON lines with another value of `name`."""
    return lambda data: b"".join(
        dump(json.loads(line) | {name: value}) + b"\n" for line in data.splitlines()
    )


def column(name: bytes, values: Iterable[bytes]) -> Callable[[bytes], bytes]:
    """A TSV whose first rows have other cells in a column."""

    def change(data: bytes) -> bytes:
        rows = [line.split(b"\t") for line in data.splitlines()]
        at = rows[0].index(name)
        for row, value in zip(rows[1:], values, strict=False):
            row[at] = value
        return b"\n".join(b"\t".join(row) for row in rows) + b"\n"

    return change


# --- plans, planners

_HEAD = {"format": 1, "pruning_ratio": 0.5, "preference": None, "scorer": None, "notes": {}}
_GROUP = {
    "tower": "language",
    "layer": 0,
    "kind": "ffn",
    "width": 9_999_999,
    "keep": 1,
    "kept": "0",
    "unit_parameters": 1,
}


def plan_of(*groups: dict[str, Any], **head: Any) -> Edit:
    return text("plan.json", dump(_HEAD | head | {"groups": [_GROUP | g for g in groups]}))


known(
    "plan",
    "overlapping ranges",
    plan_of({"kept": ",".join(["0-9999998"] * 200), "keep": 9_999_999 * 200}),
)
known(
    "plan",
    "overlapping ranges, layer by layer",
    plan_of(*({"layer": n, "kept": "0-9999998", "keep": 9_999_999} for n in range(60))),
)
known(
    "plan",
    "200,000 single units",
    plan_of({"kept": ",".join(map(str, range(2 * 10**5))), "keep": 2 * 10**5}),
)
known(
    "plan", "ranges that run backwards", plan_of({"kept": ",".join(["9-0"] * 100_000), "keep": 0})
)
known("plan", "zeros before numbers", plan_of({"kept": "000000000-000000001", "keep": 2}))
known("plan", "digits of another script", plan_of({"kept": "٣", "keep": 1}))
known("plan", "deep notes", plan_of({}, notes={"a": DEEP}))
known(
    "plan", "a surrogate as a name", plan_of({}, scorer="\ud800", pruning_ratio=1 - 1 / 9_999_999)
)
known("plan", "numbers beyond floats", plan_of({"unit_parameters": 10**400}, pruning_ratio=10**400))
known("plan", "as many sections as units", plan_of({"sections": 9_999_999}))
known("plan", "sections beyond numbers", plan_of({"sections": 10**400}))
known("plan", "a thousand groups of one name", plan_of(*[{}] * 1000))

for number in ("1e308", "-1e308", "Infinity", "-Infinity", "NaN", "1" + "0" * 400, "1e-320"):
    replaced = lambda data, number=number: b"".join(  # noqa: E731
        dump({**(row := json.loads(line)), "reward": row["reward"] | {"utility": "@"}}).replace(
            b'"@"', number.encode()
        )
        + b"\n"
        for line in data.splitlines()
    )
    known(
        "planner fit report summary",
        f"archive with utility {number[:10]}",
        text("*/archive.jsonl", replaced),
    )
known(
    "planner fit", "archive without allocations", text("*/archive.jsonl", in_rows("allocation", []))
)
known(
    "planner fit", "archive of other groups", text("*/archive.jsonl", in_rows("keep_counts", [1]))
)
known(
    "planner fit",
    "archive that keeps 10**30 units",
    text("*/archive.jsonl", in_rows("keeps", [10**30] * 10)),
)
known(
    "planner", "policy of a terabyte", setting("planner/planner.json", "policy_width", value=2**20)
)
known("planner", "policy of width -1", setting("planner/planner.json", "policy_width", value=-1))
known("planner", "policy of width 0", setting("planner/planner.json", "policy_width", value=0))
known(
    "planner",
    "a scorer that is a module's name",
    setting("planner/planner.json", "scorer", value="__doc__"),
)
known(
    "planner", "a scorer that is no planner's", setting("planner/planner.json", "mrs", value="FLAP")
)
for title, change in {
    "group of 2**60 units": {"width": 2**60},
    "group that owns nothing": {"owns": []},
    "layers below zero": {"layer": -(10**9)},
}.items():
    known("planner", title, first_group(change))
known("fit", "deep identity", text("fit/run.json", b"[" * 100_000))
known(
    "signals",
    "one bit of the scores",
    text("cache/*.safetensors", lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]),
)
known(
    "signals",
    "deep header",
    text(
        "cache/*.safetensors",
        lambda d: (len(d) + 100_000).to_bytes(8, "little") + b"[" * 100_000 + d,
    ),
)

# --- models


def _pipe(file: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    os.mkfifo(file)


_AUTO = {
    "processor_config.json": {"AutoProcessor": "evil.Evil"},
    "preprocessor_config.json": {"AutoImageProcessor": "evil.Evil"},
    "tokenizer_config.json": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
    "config.json": {
        "AutoConfig": "evil.Evil",
        "AutoModel": "evil.Evil",
        "AutoModelForCausalLM": "evil.Evil",
    },
}
_EVIL = text("model/evil.py", PYTHON.encode())
for name, classes in _AUTO.items():
    known(
        "model vlm",
        f"auto_map in {name}",
        both(_EVIL, setting(f"model/{name}", "auto_map", value=classes)),
    )
    of_no_type = setting(f"model/{name}", "model_type", value="x")
    known(
        "model vlm",
        f"auto_map in {name} of an unknown type",
        both(_EVIL, of_no_type, setting(f"model/{name}", "auto_map", value=classes)),
    )
known(
    "model vlm",
    "unknown processor with auto_map",
    both(
        _EVIL,
        setting("model/processor_config.json", "processor_class", value="EvilProcessor"),
        setting("model/processor_config.json", "auto_map", value={"AutoProcessor": "evil.Evil"}),
    ),
)
known(
    "model vlm",
    "code of another repository",
    setting("model/processor_config.json", "auto_map", "AutoProcessor", value="a/b--evil.E"),
)
known(
    "model vlm",
    "weights outside",
    setting(
        "model/model.safetensors.index.json",
        "weight_map",
        "lm_head.weight",
        value="../secret.safetensors",
    ),
)
known(
    "model vlm",
    "weights that are a FIFO",
    both(
        lambda folder: os.mkfifo(folder / "model/fifo"),
        setting("model/model.safetensors.index.json", "weight_map", "lm_head.weight", value="fifo"),
    ),
)
known(
    "model vlm",
    "a template that is a FIFO",
    lambda folder: _pipe(folder / "model/additional_chat_templates/x.jinja"),
)
for file in ("config.json", "tokenizer.json", "processor_config.json", "other.safetensors"):
    known(
        "model vlm",
        f"{file} that is a FIFO",
        lambda folder, file=file: _pipe(folder / "model" / file),
    )
known(
    "model vlm",
    "weights that are a device",
    setting(
        "model/model.safetensors.index.json", "weight_map", "lm_head.weight", value="/dev/zero"
    ),
)
known(
    "model vlm",
    "pickled weights",
    both(
        lambda folder: [file.unlink() for file in folder.glob("model/model*")],
        lambda folder: (folder / "model/pytorch_model.bin").write_bytes(pickle.dumps(_Runs())),
    ),
)
known(
    "model vlm",
    "an adapter of the hub",
    text("model/adapter_config.json", b'{"peft_type": "LORA", "base_model_name_or_path": "a/b"}'),
)
known(
    "model vlm",
    "a kernel of the hub",
    setting("model/config.json", "_attn_implementation", value="kernels-community/flash-attn"),
)
known(
    "model vlm",
    "attn_implementation of the hub",
    setting("model/config.json", "attn_implementation", value="a/b:c"),
)
known(
    "model vlm",
    "quantised by nobody",
    setting("model/config.json", "quantization_config", value={"quant_method": "evil"}),
)
for method in ("bitsandbytes", "gptq", "awq", "compressed-tensors", "torchao", "fp8", "hqq"):
    known(
        "model vlm",
        f"quantised by {method}",
        setting("model/config.json", "quantization_config", value={"quant_method": method}),
    )
known(
    "model vlm",
    "a vocabulary of 2**40",
    setting("model/config.json", "text_config", "vocab_size", value=2**40),
)
known(
    "model vlm",
    "2**17 layers",
    setting("model/config.json", "text_config", "num_hidden_layers", value=2**17),
)
known(
    "model vlm",
    "a context of 2**40",
    setting("model/config.json", "text_config", "max_position_embeddings", value=2**40),
)
known(
    "model vlm",
    "pictures of 2**20 pixels a side",
    setting("model/config.json", "vision_config", "image_size", value=2**20),
)
known(
    "model vlm",
    "widths of 2**40",
    setting("model/hipp_ext.json", "groups", 0, "width", value=2**40),
)
known(
    "model vlm",
    "an architecture that is a function",
    setting("model/config.json", "architectures", value=["AutoModel"]),
)
known(
    "model vlm",
    "an abstract architecture",
    setting("model/config.json", "architectures", value=["PreTrainedModel"]),
)
known(
    "model vlm",
    "another architecture",
    setting("model/config.json", "architectures", value=["LlamaForCausalLM"]),
)
known(
    "model vlm", "a type as text", setting("model/config.json", "dtype", value="__import__('os')")
)
known("model vlm", "deep config", text("model/config.json", b'{"a":' * 100_000))
known("model vlm", "list for a config", text("model/config.json", b"[]"))
known("model vlm", "not UTF-8", text("model/config.json", b"\xff\xfe\x00"))
known(
    "model vlm",
    "tokenizer that backtracks",
    setting(
        "model/tokenizer.json",
        "pre_tokenizer",
        value={
            "type": "Split",
            "pattern": {"Regex": "(a+)+$"},
            "behavior": "Isolated",
            "invert": False,
        },
    ),
)
known(
    "classifier",
    "pictures of 2**20 pixels a side",
    setting("classifier/config.json", "shape", value=[3, 2**20, 2**20]),
)
known(
    "classifier",
    "2**30 channels",
    setting("classifier/config.json", "shape", value=[2**30, 16, 16]),
)
known(
    "classifier",
    "channels below zero",
    setting("classifier/config.json", "shape", value=[-3, 16, 16]),
)
known("classifier", "no pixels", setting("classifier/config.json", "shape", value=[3, 0, 0]))
known(
    "classifier",
    "a million classes",
    setting("classifier/config.json", "classes", value=["a"] * 10**6),
)
known(
    "classifier",
    "kept channel that is not there",
    setting("classifier/config.json", "kept", "x.y", value=[10**9]),
)
known("classifier", "kept nothing", setting("classifier/config.json", "kept", value={}))
known(
    "lqsgd recovery",
    "deep header",
    text("**/*.safetensors", (100_000).to_bytes(8, "little") + b"[" * 100_000),
)


class _Runs:
    """A pickle that runs a command when it is read."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch /tmp/fuzz-was-here",)


# --- image sets

known(
    "tiny-imagenet",
    "a picture elsewhere",
    text("*/val/val_annotations.txt", b"../../../../secret.png\tn01443537\t0\n"),
)
known("tiny-imagenet", "a FIFO", text("*/val/val_annotations.txt", b"fifo\tn01443537\t0\n"))
known("tiny-imagenet", "a device", text("*/val/val_annotations.txt", b"/dev/zero\tn01443537\t0\n"))
known("tiny-imagenet", "a NUL", text("*/val/val_annotations.txt", b"a\0b\tn01443537\t0\n"))
known("tiny-imagenet", "not UTF-8", text("*/val/val_annotations.txt", b"\xff\xfe\n"))


# --- tables and data

_PLACES = (
    "../secret.png",
    "../../secret.png",
    "/dev/zero",
    "/dev/stdin",
    "fifo",
    "images/fifo",
    "/proc/self/mem",
    "a\0b",
    ".",
    "",
    "x" * 5000,
)
for place in _PLACES:
    cells = [place.encode()] * 9
    known("tsv-paths", f"picture at {place[:20]!r}", text("*.tsv", column(b"image_path", cells)))
    known(
        "coco",
        f"picture at {place[:20]!r}",
        both(*(setting("instances.json", "images", n, "file_name", value=place) for n in range(4))),
    )
    known("pope", f"picture at {place[:20]!r}", text("coco_pope_*.json", in_rows("image", place)))
    known(
        "amber",
        f"picture at {place[:20]!r}",
        setting("data/query/query_discriminative.json", 0, "image", value=place),
    )
    known(
        "hallusionbench",
        f"picture at {place[:20]!r}",
        setting("HallusionBench.json", 0, "filename", value=place),
    )
    known(
        "scienceqa",
        f"picture at {place[:20]!r}",
        both(*(setting("problems.json", str(n), "image", value=place) for n in range(3))),
    )
    known(
        "scienceqa",
        f"split {place[:20]!r}",
        both(*(setting("problems.json", str(n), "split", value=place) for n in range(3))),
    )
    known(
        "report compare",
        f"image {place[:20]!r}",
        text("outputs/*/*/*/questions.jsonl", in_rows("image", "../" * 3 + place[:-4])),
    )
for name, picture in PICTURES.items():
    known(
        "tsv tsv-choice lm-eval",
        name,
        text("*.tsv", column(b"image", [base64.b64encode(picture) or b"x"] * 9)),
    )
    known("tsv-paths scienceqa", name, text("images/**/*.png", picture))
    known("coco", name, text("images/*.jpg", picture))
    known("tiny-imagenet", name, text("*/*/**/*.JPEG", picture))
for what, cell in {
    "a NUL": b"a\0b",
    "no UTF-8": b"\xff\xfe",
    "10**400": b"1" + b"0" * 400,
    "inf": b"inf",
    "markup": b"[/b]",
}.items():
    for name in (b"index", b"question", b"answer", b"category"):
        change = text("*.tsv", column(name, [cell]))
        known("tsv tsv-benchmarks", f"{what} as {name.decode()}", change)
known("tsv", "open quote", text("*.tsv", lambda data: data.replace(b"\t", b'\t"', 1) + b'"' * 99))
known(
    "tsv",
    "a million columns",
    text("*.tsv", lambda data: b"\t".join([data.splitlines()[0], *([b"A"] * 10**6)]) + b"\n"),
)
known(
    "tsv tsv-choice",
    "a chain of references",
    text("*.tsv", column(b"image", [b"1", b"2", b"3", b"0"])),
)
for what, value in {
    "unhashable": [],
    "a surrogate": "\ud800",
    "10**400": 10**400,
    "NaN": float("nan"),
    "deep": DEEP,
    "null": None,
}.items():
    known("coco", f"image id {what}", setting("instances.json", "images", 0, "id", value=value))
    known(
        "coco", f"category id {what}", setting("instances.json", "categories", 0, "id", value=value)
    )
    known(
        "coco",
        f"category name {what}",
        setting("instances.json", "categories", 0, "name", value=value),
    )
    known(
        "coco",
        f"caption of {what}",
        setting("captions.json", "annotations", 0, "image_id", value=value),
    )
    known("coco", f"synonym {what}", setting("synonyms.json", "person", value=[value]))
    known("pope", f"text {what}", text("coco_pope_*.json", in_rows("text", value)))
    known("pope", f"label {what}", text("coco_pope_*.json", in_rows("label", value)))
    for field in ("id", "type", "truth"):
        change = setting("data/annotations.json", 5, field, value=value)
        known("amber", f"{field} {what}", change)
    for field in ("id", "query"):
        change = setting("data/query/query_discriminative.json", 1, field, value=value)
        known("amber", f"query's {field} {what}", change)
    for field in ("category", "set_id", "question", "gt_answer", "visual_input", "filename"):
        change = setting("HallusionBench.json", 1, field, value=value)
        known("hallusionbench", f"{field} {what}", change)
    known("scienceqa", f"answer {what}", setting("problems.json", "0", "answer", value=value))
    known(
        "scienceqa", f"choice {what}", setting("problems.json", "0", "choices", value=["a", value])
    )
    known("scienceqa", f"hint {what}", setting("problems.json", "0", "hint", value=value))
    known("scienceqa", f"question {what}", setting("problems.json", "0", "question", value=value))
known("pope", "not UTF-8", text("coco_pope_random.json", b"\xff\xfe\n"))
known("mme", "not UTF-8", text("MME_Benchmark/OCR/*.txt", b"\xff\xfe\tYes\n\tNo\n"))
known("mme", "a NUL", text("MME_Benchmark/OCR/*.txt", b"a\0b\tYes\na\tNo\n"))
known("mme", "only tabs", text("MME_Benchmark/OCR/*.txt", b"\t\t\tYes\n\t\tNo\n"))
known(
    "scienceqa",
    "id of digits of another script",
    both(
        setting("pid_splits.json", "val", value=["²"]),
        setting("problems.json", "²", value={"image": "image.png"}),
    ),
)
known(
    "scienceqa",
    "id of 5,000 digits",
    both(
        setting("pid_splits.json", "val", value=["9" * 5000]),
        setting("problems.json", "9" * 5000, value={"image": "image.png"}),
    ),
)
for cut in (4, 100, 300, 700):
    known(
        "parquet",
        f"without its first {cut} bytes",
        text("*.parquet", lambda data, cut=cut: data[:4] + data[4 + cut :]),
    )
    known(
        "parquet",
        f"{cut} zeros in its pages",
        text("*.parquet", lambda data, cut=cut: data[:60] + bytes(cut) + data[60 + cut :]),
    )

# --- calibration


def chats(*turns: Any, **row: Any) -> Edit:
    """A file of chats of one row, in each of the shapes that it may have."""
    messages = [{"role": "user", "content": turn} for turn in turns]
    values = [{"from": "human", "value": turn} for turn in turns]
    return both(
        text("*.jsonl", dump({"messages": messages} | row) + b"\n"),
        text("*.json", dump([{"conversations": values} | row])),
    )


CHATS = "calibration-chats calibration-llava"
for place in _PLACES:
    known(CHATS, f"picture at {place[:20]!r}", chats("<image>cup", image=place))
    part = [{"type": "image_url", "image_url": {"url": place}}]
    known("calibration-chats", f"part at {place[:20]!r}", chats(part))
    file = {"_data_files": [{"filename": place}]}
    known("calibration-saved", f"shard at {place[:20]!r}", text("saved/state.json", dump(file)))
for name, picture in PICTURES.items():
    known(CHATS, f"{name} beside the chats", text("images/*.png", picture))
    known(
        "calibration-tsv",
        name,
        text("*.tsv", column(b"image", [base64.b64encode(picture) or b"x"] * 9)),
    )
for what, value in {
    "a surrogate": "\ud800",
    "a NUL": "a\0b",
    "10**400": 10**400,
    "deep": DEEP,
    "a list": [[]],
    "special tokens": "</s><s><pad><image>",
    "a megabyte": "cup " * 300_000,
    "blanks": " \n" * 10_000,
    "a word of a megabyte": "x" * 2**20,
}.items():
    known(CHATS, f"turn of {what}", chats(value))
    known(CHATS, f"picture of {what}", chats("<image>cup", image=value))
    known("calibration-chats", f"text of {what}", text("*.jsonl", dump({"text": value}) + b"\n"))
    if isinstance(value, str) and value not in ("\ud800", DEEP):
        known("calibration-txt", what, text("*.txt", value.encode()))
known(CHATS, "a thousand pictures", chats("<image>" * 1000, image=["images/0.png"] * 1000))
known(CHATS, "ten thousand turns", chats(*["cup"] * 10**4))
_ANSWERED = [{"role": role, "content": "cup"} for role in ("user", "assistant")] * 10**4
known(
    "calibration-chats",
    "ten thousand answers",
    text("*.jsonl", dump({"messages": _ANSWERED}) + b"\n"),
)
known(CHATS, "a FIFO", lambda folder: [_pipe(p) for p in folder.glob("*.json*")])
known("calibration-txt", "not UTF-8", text("*.txt", b"\xff\xfe\n"))
known("calibration-tsv", "open quote", text("*.tsv", lambda data: data + b'"' * 99))
known(
    "calibration-tsv", "a chain of references", text("*.tsv", column(b"image", [b"1", b"2", b"0"]))
)
known(
    "calibration-tsv",
    "a million columns",
    text("*.tsv", lambda data: b"\t".join([data.splitlines()[0], *([b"A"] * 10**6)]) + b"\n"),
)
for cut in (8, 100, 600, 900):
    known(
        "calibration-saved",
        f"without {cut} bytes",
        text("saved/*.arrow", lambda data, cut=cut: data[:cut] + data[2 * cut :]),
    )
    known(
        "calibration-saved",
        f"ones after {cut} bytes",
        text("saved/*.arrow", lambda data, cut=cut: data[:cut] + b"\xff" * 9 + data[cut + 9 :]),
    )

# --- results, reports

SCRIPT = "<script>alert(1)</script>"
for path in (
    ("threads",),
    ("device",),
    ("command",),
    *(("load", key) for key in ("rows", "repeats", "warmup", "seed")),
):
    known(
        "report summary",
        f"script as {'.'.join(path)}",
        setting("latency.json", *path, value=SCRIPT),
    )
for path in (
    ("parameters",),
    ("prefill_ms", "median"),
    ("prefill_ms", "n"),
    ("decode_speedup", "n"),
    ("weights_mib",),
):
    for value in (SCRIPT, 0, 10**400, float("nan")):
        known(
            "report",
            f"{'.'.join(path)} {str(value)[:12]}",
            setting("latency.json", "models", "small", *path, value=value),
        )
for value in (SCRIPT, "\ud800", [], [[]], {}, 10**400, -1):
    for path in (("runtime",), ("rounds",)):
        known(
            "report",
            f"served {'.'.join(path)} {str(value)[:12]!r}",
            setting("served.json", "serving", *path, value=value),
        )
    for key in ("prefill_ms", "memory_mib", "prefill_speedup"):
        known(
            "report",
            f"served {key} {str(value)[:12]!r}",
            setting("served.json", "models", "small", key, value=value),
        )
    for path in (
        ("data",),
        ("n",),
        ("settings",),
        ("made",),
        ("counts", "image"),
        ("counts", "wrong"),
    ):
        known(
            "report",
            f"captions {'.'.join(path)} {str(value)[:12]!r}",
            setting("outputs/small*/CHAIR-coco/run-1/scores.json", *path, value=value),
        )
for key in (
    "model",
    "model_hash",
    "data",
    "data_hash",
    "n",
    "command",
    "predictions",
    "settings",
    "metrics",
):
    for value in (SCRIPT, "[/b]", "\ud800", [], 10**400):
        known(
            "report compare",
            f"results {key} {str(value)[:12]!r}",
            setting("outputs/small*/*/results.json", key, value=value),
        )
for place in (
    "/etc/passwd",
    "/dev/zero",
    "run-0/fifo",
    "../fifo",
    "../../../../secret.png",
    "x/..",
    "a\0b/c",
    "",
    "run-0/predictions.jsonl/x",
    "predictions.jsonl",
):
    known(
        "report compare",
        f"predictions at {place!r}",
        setting("outputs/*/*/results.json", "predictions", value=place),
    )
    known("summary", f"planner at {place!r}", setting("summary.json", "planner", value=place))
for key in ("index", "question", "answer", "category", "image", "options"):
    for value in (SCRIPT, "[/b]", "\ud800", [], {SCRIPT: SCRIPT}):
        known(
            "report compare",
            f"questions {key} {str(value)[:12]!r}",
            text("outputs/*/*/*/questions.jsonl", in_rows(key, value)),
        )
for key in ("index", "prediction"):
    for value in (SCRIPT, "\ud800", []):
        known(
            "report compare predictions",
            f"{key} {str(value)[:12]!r}",
            text("**/predictions.jsonl", in_rows(key, value)),
        )
known(
    "compare",
    "an answer of a megabyte",
    text("outputs/small*/*/*/predictions.jsonl", in_rows("prediction", "A " * 500_000)),
)
known(
    "report compare predictions",
    "deep line",
    text("**/predictions.jsonl", lambda d: b"[" * 100_000 + b"\n" + d),
)
known("report summary", "deep latency", text("latency.json", b"[" * 100_000))
known(
    "tiny-imagenet",
    "a name too long for a file",
    text("*/val/val_annotations.txt", b"x" * 5000 + b"\tn01443537\n"),
)
for key in ("name", "preference", "parameters", "records", "plan", "reward"):
    for value in (SCRIPT, "\ud800", [], 10**400):
        known(
            "summary",
            f"entry {key} {str(value)[:12]!r}",
            setting("summary.json", "entries", 1, key, value=value),
        )
