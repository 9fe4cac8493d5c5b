"""Who a volume is of: a keyed hash inside the store, and the split that keeps a subject's volumes together."""

import hashlib
import hmac
import os
import secrets
from collections.abc import Collection, Mapping, Set
from pathlib import Path

from mimscale import durable
from mimscale.errors import ConfigError, DataError
from mimscale.store import layout

KEY_BYTES = 32


def subject_key(store: Path, path: str | None) -> bytes:
    """The secret that hides subject names; made on first use, readable by its owner only.

    Raises:
        ConfigError: it is gone although the store was made with it, others may read it, or it is no key.
    """
    file = Path(path) if path is not None else store.with_name(f"{store.name}.subject_key")
    if not file.exists():
        if layout.info_path(store).exists():
            made_with = layout.read_info(store).subject_key_fingerprint
            raise ConfigError(
                f"{file}: the subject key {made_with} of {store} is gone; put it back or give it with subject_key=FILE"
            )
        with durable.explained(DataError, file, "choose another out or subject_key"):
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as out:
                out.write(secrets.token_hex(KEY_BYTES) + "\n")
    with durable.explained(ConfigError, file, "give a key that you may read"):
        mode, text = file.stat().st_mode & 0o777, file.read_text().strip()
    if mode & 0o077:
        raise ConfigError(f"{file}: mode {mode:04o} lets others read the subject key; run chmod 600 {file}")
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise ConfigError(f"{file}: not a subject key ({2 * KEY_BYTES} hex digits); remove it, or restore it")
    return key


def fingerprint(key: bytes) -> str:
    """What the store tells of its subject key."""
    return hashlib.sha256(b"mimscale subject key " + key).hexdigest()[:16]


def hidden(subject: str, key: bytes) -> str:
    """What the store calls a subject: 16 hex digits that nobody can turn back or guess without the key."""
    return hmac.digest(key, os.fsencode(subject), "sha256").hex()[:16]


def splits(
    subjects: Mapping[str, str | None], decided: Mapping[str, str], val_fraction: float, split_seed: int
) -> dict[str, str]:
    """The split of each subject: "train" or "val".

    Args:
        subjects: name -> the split that its list asks for, or None.
        decided: name -> split of those that the store holds already. They keep it: a subject that a model was trained
            on must never become one that it is validated on.
        val_fraction: see `held_out_subjects`, which chooses among the others.
        split_seed: see there.
    """
    fixed = {**{name: split for name, split in subjects.items() if split is not None}, **decided}
    held_out = held_out_subjects(subjects.keys() - fixed.keys(), val_fraction, split_seed, decided=fixed.values())
    return {name: fixed.get(name) or ("val" if name in held_out else "train") for name in subjects}


def held_out_subjects(
    subjects: Set[str], val_fraction: float, split_seed: int, *, decided: Collection[str] = ()
) -> set[str]:
    """The subjects of the validation split: at least one of two or more, never all, for a fraction above 0.

    Subjects are ranked by a hash of seed and name, so the choice depends on no order of files or workers.

    Args:
        subjects: those to choose from.
        val_fraction: share of all subjects, `decided` included.
        split_seed: which subjects are chosen.
        decided: the splits of subjects that are not to be chosen from.
    """
    total, held_already = len(subjects) + len(decided), sum(split == "val" for split in decided)
    if val_fraction == 0 or total < 2:
        return set()
    wanted = min(max(1, round(val_fraction * total)), total - 1) - held_already
    ranked = sorted(subjects, key=lambda name: hashlib.sha256(os.fsencode(f"{split_seed} {name}")).digest())
    return set(ranked[: max(0, wanted)])
