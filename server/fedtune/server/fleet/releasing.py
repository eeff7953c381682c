"""The owner's release of an exported model or an edge pack: a signature over the very files that the signer holds."""

from __future__ import annotations

from pathlib import Path

from fedtune.core.errors import InputError
from fedtune.core.manifest.model_release import DAYS, ModelRelease
from fedtune.core.protocol.model_manifest import FORMATS, MANIFEST, PACK_FORMAT, PACK_KIND, manifest_digest, verify
from fedtune.server.fleet.owner_home import Check, OwnerHome


def release_model(
    owner: OwnerHome, directory: Path, name: str | None = None, days: float = DAYS, check: Check | None = None
) -> ModelRelease:
    """Releases a job's model or a base's edge pack, after every file was checked.

    Args:
        directory: an exported directory or a pack, or the folder that has one for each format.
        name: name of the job or the pack on the server; None for the name that the export states.
        check: raises InputError for a release that its server would refuse; its number is then still free.

    Raises:
        ExportError: there is no export, or a file of it was changed.
        InputError: an export is no model by itself, or they are of different models; or the check refuses the release.
    """
    exports = [directory / form for form in (*FORMATS, PACK_FORMAT) if (directory / form / MANIFEST).is_file()]
    manifests = {path: verify(path) for path in exports or [directory]}
    for path, manifest in manifests.items():
        if manifest.kind not in ("model", PACK_KIND):
            raise InputError(f"{path}: an export of kind {manifest.kind}; devices can install a model or an edge pack")
    stated = sorted({manifest.name for manifest in manifests.values()})
    if name is None and len(stated) > 1:
        raise InputError(f"{directory}: exports of {', '.join(stated)}; expected one model, or --name of its job")
    models = {manifest.format: manifest_digest(path) for path, manifest in manifests.items()}
    return owner.release(name or stated[0], models, days, check)
