"""The store as one run sees it: which volumes, in which order, and what travels with weights that learned from them."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimscale.errors import ConfigError, DataError
from mimscale.store.layout import StoreInfo, overlay_path, pack_path, read_info, stored_overlay
from mimscale.store.manifest import TRAINING_COLUMNS, Manifest, load_manifest
from mimscale.store.stage import STAGE_COLUMNS, Stage, packs_of
from mimscale.stream.batch import Batch
from mimscale.stream.loader import StreamLoader, fixed_batches
from mimscale.stream.plan import FixedPlan, SamplePlan
from mimscale.stream.select import parse_attribute, parse_filter, refuse_mixed_spacings
from mimscale.stream.staging import Copier, upcoming_packs
from mimscale.stream.subjects import first_subjects, in_split
from mimscale.train.build import weights_contract
from mimscale.train.config import RunConfig, accumulation
from mimscale.train.volume_facts import VolumeFacts
from mimscale.world import World

Indices = NDArray[np.int64]


class TrainingData:
    """The store as one run sees it: its train and validation volumes and the order of the samples.

    Args:
        config: of the run.
        overlay: labels that every volume must have, or None.
        usable: those of some rows of the manifest that the run can learn from.

    Raises:
        DataError: no store, or no volume that the config selects.
        ConfigError: labels on the grid of the sources.
    """

    def __init__(
        self,
        config: RunConfig,
        overlay: str | None,
        usable: Callable[[Manifest, Indices], Indices] = lambda manifest, indices: indices,
    ) -> None:
        self.config = config
        self.overlay = overlay
        self._usable = usable
        self.info: StoreInfo = read_info(config.store)
        if overlay is not None and overlay not in self.info.overlays:
            known = ", ".join(self.info.overlays) or "none, so ingest the volumes with their labels"
            raise DataError(f"{config.store}: no overlay {overlay!r}; there are: {known}")
        if overlay is not None and overlay != stored_overlay(overlay):
            raise ConfigError(
                f"overlay={overlay}: lies on the grid of the sources, for scores; train with "
                f"overlay={stored_overlay(overlay)}"
            )
        stream = config.stream
        filtered = None if stream.filter is None else parse_filter(stream.filter)
        by = None if stream.weights is None else parse_attribute(stream.weights.by, "stream.weights.by")
        columns = {"spacing_mm"}.union(*(part.columns for part in (filtered, by) if part is not None))
        if stream.fold is not None or stream.train_fraction < 1:
            columns = columns | {"subject"}
        self.manifest: Manifest = load_manifest(config.store, sorted(columns.union(TRAINING_COLUMNS)))
        self._kept = np.ones(len(self.manifest), bool) if filtered is None else filtered.select(self.manifest)
        self.train: NDArray[np.int64] = first_subjects(self.manifest, self._selected("train"), stream.train_fraction)
        self.validation = self._selected("val")[: config.validation.max_volumes]
        if not len(self.train):
            raise DataError(
                f"{config.store}: no training volume with modality={config.modality}, overlay={overlay}, "
                f"stream.filter={stream.filter}; see `mimscale inspect {config.store}`"
            )
        if config.checkpoint.keep_best is not None and not len(self.validation):
            raise DataError(
                f"{config.store}: no validation volume, so checkpoint.keep_best={config.checkpoint.keep_best} would "
                "keep nothing; set it to null, or ingest with a validation split"
            )
        refuse_mixed_spacings(self.manifest, self.train, stream)
        self.channels = self.manifest.sample_row(int(self.train[0])).shape[0]
        self.plan = SamplePlan.of(
            self.manifest,
            self.train,
            seed=config.seed,
            crop_voxels=config.crop_voxels,
            config=config.stream,
            global_batch=config.global_batch,
            store=config.store,
            overlay=overlay,
        )

    def _selected(self, split: str) -> NDArray[np.int64]:
        """Volumes of a split that the config asks for, and that have the overlay, when there is one."""
        wanted = {} if self.config.modality is None else {"modality": self.config.modality}
        in_its_split = in_split(self.manifest, split, self.config.stream)
        indices: NDArray[np.int64] = np.flatnonzero(self._kept & in_its_split & self.manifest.equal(**wanted))
        if self.overlay is not None:
            indices = indices[self.manifest.overlay_parts(self.overlay)[indices] >= 0]
        return self._usable(self.manifest, indices)

    @cached_property
    def stage(self) -> Stage | None:
        """Where copies of packs may lie on this node, when the config has a place for them.

        Raises:
            DataError: the folder cannot be made or written.
        """
        stream = self.config.stream
        if stream.stage_dir is None:
            return None
        packs = packs_of(self.config.store, load_manifest(self.config.store, STAGE_COLUMNS), self.overlay)
        return Stage(stream.stage_dir, int(stream.stage_gib * 2**30), packs)

    def _paths_of(self, volume: int) -> list[Path]:
        """The packs that a training volume lies in."""
        row = self.manifest.sample_row(int(self.train[volume]))
        paths = [pack_path(self.config.store, row.part)]
        if self.overlay is not None:
            paths.append(overlay_path(self.config.store, self.overlay, row.overlays[self.overlay].part))
        return paths

    def loader(self, world: World, start_batch: int) -> StreamLoader:
        """Micro-batches of this rank from global batch `start_batch` on; on local rank 0 also the node's copier."""
        copier = None
        if self.stage is not None and world.local_rank == 0:
            micro_batches = accumulation(self.config, world.size)
            upcoming = upcoming_packs(self.plan, world, micro_batches, self._paths_of)
            copier = Copier(self.stage, upcoming, self.plan.batches_per_epoch, start_batch)
            copier.start()
        return StreamLoader(
            store=self.config.store,
            manifest=self.manifest,
            indices=self.train,
            plan=self.plan,
            config=self.config.stream,
            world=world,
            micro_batch=self.config.micro_batch,
            accumulation=accumulation(self.config, world.size),
            overlay=self.overlay,
            start_batch=start_batch,
            stage=self.stage,
            copier=copier,
        )

    def contract(self, step: int, precision: str) -> dict[str, Any]:
        """What travels with the weights of `step`."""
        return weights_contract(
            self.config,
            self.info,
            channels=self.channels,
            step=step,
            precision=precision,
            overlay=self.overlay,
            datasets=self.manifest.datasets(self.train),
            spacing_mm=np.median(self.manifest.column("spacing_mm")[self.train], axis=0).round(4).tolist(),
        )

    def validation_batches(self, world: World) -> Iterator[Batch]:
        """Crops that never change, dealt out to the ranks; every rank gets the same number of batches."""
        config = self.config
        plan = FixedPlan.of(
            self.manifest,
            self.validation,
            seed=config.seed,
            crop_voxels=config.crop_voxels,
            config=replace(config.stream, crops_per_volume=config.validation.crops_per_volume),
            store=config.store,
            overlay=self.overlay,
        )
        facts = VolumeFacts(self.manifest, self.validation, self.info.intensity)
        batches = fixed_batches(
            store=config.store,
            manifest=self.manifest,
            indices=self.validation,
            plan=plan,
            world=world,
            batch=config.micro_batch,
            config=config.stream,
            overlay=self.overlay,
            stage=self.stage,
        )
        return facts.added(batches)
