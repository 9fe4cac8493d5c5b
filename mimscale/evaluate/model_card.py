"""What goes along with weights that leave a run: a contract without places, and a model card. No patient data."""

from collections.abc import Sequence
from typing import Any

from mimscale.targets.results import SHORT, score_text
from mimscale.train.method import title_of
from mimscale.train.run_dir import RunDir

# Of a recipe: where things lay on the machine that trained, which is nobody else's affair.
PLACES = ("store", "run_dir", "init_from")
TABLE_KEYS = ("table", "journal", "table_hash")  # of `targets`: where the table lay, and a hash of what it says of whom
PURPOSES = {
    "pretrain": "starting points of fine-tuning, and features",
    "finetune": "research on segmentation of the classes above",
    "imported": "starting points of fine-tuning",
}


def shareable_contract(contract: dict[str, Any], run: RunDir, environment: dict[str, Any]) -> dict[str, Any]:
    """The contract of a checkpoint, with the recipe and the code that made it, and nothing about where.

    Args:
        contract: of the checkpoint.
        run: whose checkpoint it is.
        environment: what env.json says of the run's newest job; empty when there is none.
    """
    recipe = {key: value for key, value in run.read_config_tree().items() if key not in PLACES}
    if isinstance(targets := recipe.get("targets"), dict):
        recipe["targets"] = {key: value for key, value in targets.items() if key not in TABLE_KEYS}
    return {
        **contract,
        "recipe": _without_places(recipe),
        "git_commit": environment.get("commit"),
        "packages": environment.get("packages"),
    }


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_places(item) for key, item in value.items() if not key.endswith("_dir")}
    if isinstance(value, list):
        return [_without_places(item) for item in value]
    return None if isinstance(value, str) and (value.startswith(("/", "~")) or "://" in value) else value


def model_card(contract: dict[str, Any], scores: dict[str, Any] | None, loading: Sequence[str]) -> str:
    """What somebody must know who gets nothing but these weights, as Markdown.

    Args:
        contract: as it lies beside the weights.
        scores: scores.json of an evaluation of these weights, or None.
        loading: lines of the section on how to load them.
    """
    kind = str(contract.get("kind"))
    what, purpose = _what(kind, contract), PURPOSES.get(kind, "research")
    if _targets(contract):
        purpose = "research on the targets above"
    lines = [
        f"# 3D {what}",
        "",
        "`weights.safetensors` holds fp32 tensors, `contract.json` what they expect of their input and how they were "
        "made. Neither holds code, and neither holds anything about a patient.",
        "",
        *_table("Model", _architecture(contract)),
        *_table("Training", _training(contract)),
        "## Scores",
        "",
        *_scores(scores),
        "",
        "## Intended use",
        "",
        f"For {purpose}, on volumes of the modality, spacing and intensities above. Not a medical device: not for "
        "diagnosis or treatment. Scores hold for volumes like those that they were measured on. The licences of the "
        "data sets bind who uses the weights.",
        "",
        "## How to load",
        "",
        *loading,
        "",
    ]
    return "\n".join(lines)


def _what(kind: str, contract: dict[str, Any]) -> str:
    if kind == "pretrain":
        return title_of("method", str(contract.get("method", "mae")))
    return title_of("head", str(contract.get("head", "unetr"))) if kind == "finetune" else "vision transformer"


def _architecture(contract: dict[str, Any]) -> dict[str, Any]:
    model, intensity = contract.get("model") or {}, contract.get("intensity") or {}
    crop, patch = (" x ".join(map(str, contract.get(key) or ["?"])) for key in ("crop_voxels", "patch_voxels"))
    names = [name for name in model if name not in ("drop_path", "checkpoint_activations")]
    if "positions" in model:  # a ViT, whose other keys say little
        names = ["dim", "depth", "heads", "mlp_ratio", "positions"]
    rows = {
        "encoder": ", ".join(f"{name} {model[name]}" for name in names if name in model),
        "input": f"{contract.get('channels', '?')} channel(s), {crop} voxels (Z, Y, X), patch {patch}",
        "axes": contract.get("axis_order"),
        "spacing, mm": _spacing(contract),
        "intensity": ", ".join(f"{key}: {value}" for key, value in intensity.items() if value is not None) or None,
        "classes": ", ".join(contract.get("class_names") or []) or None,
        **{f"target {one['name']}": _output(one) for one in _targets(contract)},
    }
    return {key: "unknown" if value is None and key != "classes" else value for key, value in rows.items()}


def _targets(contract: dict[str, Any]) -> list[dict[str, Any]]:
    """What the outputs of a network for targets mean; none of another network."""
    return (contract.get("targets") or {}).get("outputs") or []


def _output(target: dict[str, Any]) -> str:
    if target["kind"] == "regress":
        return f"a number, output x {target['deviation']:.6g} + {target['mean']:.6g}"
    counts = zip(target["classes"], target["training_volumes"], strict=True)
    return ", ".join(f"{name} ({count} training volumes)" for name, count in counts)


def _spacing(contract: dict[str, Any]) -> str | None:
    if contract.get("target_spacing_mm"):
        return f"{' x '.join(map(str, contract['target_spacing_mm']))} (Z, Y, X), resampled"
    if contract.get("spacing_mm"):
        return f"{' x '.join(map(str, contract['spacing_mm']))} (Z, Y, X), median; as the scanner gave it"
    return None


def _training(contract: dict[str, Any]) -> dict[str, Any]:
    recipe, packages = contract.get("recipe") or {}, contract.get("packages") or {}
    step, batch = contract.get("step"), recipe.get("global_batch")
    optim = recipe.get("optim") or {}
    rows: dict[str, Any] = {
        f"data {number}": f"{entry.get('volumes')} volumes of {entry.get('dataset')}, licence: {entry.get('licence')}"
        for number, entry in enumerate(contract.get("datasets") or [], 1)
    }
    rows |= {
        "modality": contract.get("modality"),
        "steps": None if step is None else f"{step}" + (f" of {batch} crops: {step * batch} crops" if batch else ""),
        "optimiser": f"AdamW, lr {optim['lr']}, weight decay {optim.get('weight_decay')}" if "lr" in optim else None,
        "precision": contract.get("trained_in"),
        "seed": recipe.get("seed"),
        "store": contract.get("store_ingest_hash"),
        "code": contract.get("git_commit"),
        "versions": ", ".join(f"{name} {version}" for name, version in packages.items() if version) or None,
        "imported from": contract.get("imported_from"),
    }
    return rows


def _scores(scores: dict[str, Any] | None) -> list[str]:
    if scores is None:
        return ["These weights have not been evaluated."]
    if scores["kind"] == "pretrain":
        mean = scores["mean"]
        return [
            f"{scores['error']} of hidden voxels on {len(scores['crops'])} {scores['split']} crops: "
            f"{mean['network']:.4f}; {scores['baseline']}: {mean['baseline']:.4f}."
        ]
    if "targets" in scores:
        return _target_scores(scores)
    lines = [f"On {len(scores['cases'])} whole {scores['split']} volumes:", "", "| class | Dice |", "|---|---|"]
    for name, entry in scores["per_class"].items():
        value = entry["dice"]["mean"]
        lines.append(f"| {_cell(name)} | {'not defined' if value is None else f'{value:.4f}'} |")
    return lines


def _target_scores(scores: dict[str, Any]) -> list[str]:
    lines = [
        f"On {scores['volumes']} whole {scores['split']} volumes; intervals: {scores['intervals']}.",
        "",
        "| target | predictor | over | score | value |",
        "|---|---|---|---|---|",
    ]
    for target in scores["targets"]:
        for row in target["rows"]:
            start = " | ".join(_cell(text) for text in (target["name"], row["predictor"], row["of"]))
            lines += [f"| {start} | {SHORT[name]} | {score_text(score)} |" for name, score in row["scores"].items()]
    return lines


def _table(title: str, rows: dict[str, Any]) -> list[str]:
    told = [f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items() if value is not None]
    return [f"## {title}", "", "| | |", "|---|---|", *told, ""]


def _cell(value: Any) -> str:
    """Text that stays inside its cell: names of data sets and classes come from tables that anybody may write."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
