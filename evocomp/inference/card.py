"""The model card of a compressor, written to README.md of its folder: base model, data, training settings and
results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError

from evocomp.compressor.config import EvoCompConfig
from evocomp.compressor.lora import save_lora
from evocomp.compressor.model import EvoCompCompressor
from evocomp.files import write_whole
from evocomp.log import UserError
from evocomp.mllm.hf import SHIPPED_MODELS

USE = """```python
import evocomp
{load}
content = [{{"type": "image", "path": "image.png"}}, {{"type": "text", "text": "the question"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)
with evocomp.compress(model, "path/to/this/folder", keep={keep}, layer={layer}) as handle:
    output = model.generate(**inputs)
print(processor.decode(output[0], skip_special_tokens=True))
print(handle.last.before, "->", handle.last.after, "visual tokens")
```"""
LOAD = """from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{base}")
processor = AutoProcessor.from_pretrained("{base}")"""
LOAD_SHIPPED = """
model, processor = evocomp.load_nano("{base}")"""


def save(
    compressor: EvoCompCompressor | PeftModel,
    folder: str | Path,
    panel: Sequence[Mapping[str, Any]] | None = None,
    **metadata: Any,
) -> None:
    """Save weights (or the LoRA adapter), configuration and card to `folder`.

    panel: results, one mapping of column to value per row, all with the same columns.
    metadata: added to `config.metadata`. The card shows `data` and `notes` (text), `labels` and `training`
    (mappings of settings).
    """
    adapter = not isinstance(compressor, EvoCompCompressor)
    config = compressor.get_base_model().config if adapter else compressor.config
    if panel:
        # lists, because the file sorts the keys of mappings, which would lose the order of the columns
        metadata["panel"] = [list(panel[0]), *([row.get(column, "") for column in panel[0]] for row in panel)]
    config.metadata = {**config.metadata, **metadata}
    try:
        if adapter:
            save_lora(compressor, folder)
        else:
            compressor.save_pretrained(folder)
    except SafetensorError as error:  # it wraps what the disk says
        raise UserError(f"{folder} cannot be written ({error}); mend this and run the same command again") from None
    write_whole(Path(folder, "README.md"), card(config).encode("utf-8", "replace"))


def card(config: EvoCompConfig) -> str:
    """The card as Markdown with Hugging Face front matter. Missing entries are shown as "Not recorded"."""
    known, base = config.metadata, _public_name(config.base_model_name_or_path)
    front = ["---", "library_name: evocomp", "tags:", "- visual-token-compression", "- image-text-to-text"]
    front += [f"base_model: {base}"] if base else []
    settings = {
        "target model": base or "not recorded",
        "hidden size": config.hidden_size,
        "decoder layers": config.num_layers,
        "their hidden size": config.layer_size,
        "reads the prompt": "yes" if config.use_text else "no",
        "reads the budget": "yes" if config.budget_input else "no",
        "kept per image (default)": config.keep,
        "maximum of selected tokens (or fraction)": f"{config.sharp:.3g}" if config.sharp else "all that are kept",
        "dropped before layer": config.prune_layer,
        "positions of kept tokens": config.positions,
    }
    parts = [
        "\n".join([*front, "---"]),
        f"# EvoComp compressor for {base or 'a multimodal LLM'}",
        "Scores the visual tokens of an image for a prompt. The highest are kept, "
        + ("together with means of dropped tokens." if config.sharp else "the others never reach the LLM."),
        USE.format(
            load=(LOAD_SHIPPED if base in SHIPPED_MODELS else LOAD).format(base=base or "the target model"),
            keep=config.keep,
            layer=config.prune_layer,
        ),
        "## Compressor\n\n" + table([("setting", "value"), *settings.items()]),
        "## Data\n\n" + str(known.get("data") or "Not recorded."),
        "## Labels\n\n" + _settings(known.get("labels")),
        "## Training\n\n" + _settings(known.get("training")),
        "## Results\n\n" + (table(known["panel"]) if known.get("panel") else "Not recorded."),
    ]
    if known.get("notes"):
        parts.append("## Notes\n\n" + str(known["notes"]))
    return "\n\n".join(parts) + "\n"


def _settings(values: Mapping[str, Any] | None) -> str:
    return table([("setting", "value"), *sorted(values.items())]) if values else "Not recorded."


def _public_name(name: str | None) -> str | None:
    """A hub id unchanged; of a local path only the last part."""
    if not name:
        return None
    is_path = Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or "\\" in name
    return Path(name.replace("\\", "/")).name if is_path else name


def table(lines: Sequence[Sequence[Any]]) -> str:
    """A Markdown table of lines of cells; the first line holds the column names."""
    ruled = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in ruled)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
