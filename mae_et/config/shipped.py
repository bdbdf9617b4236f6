"""Find the configs that are shipped, and suggest one for a name that none has."""

import difflib
import re
from pathlib import Path

from mae_et.config.words import expand_path
from mae_et.errors import UserError


def shipped_configs() -> Path:
    """Return the folder of the shipped configs."""
    package = Path(__file__).parents[1]
    # An installed wheel has the folder inside the package; a checkout has it beside the package.
    folders = (package / "configs", package.parent / "configs")
    return next((folder for folder in folders if folder.is_dir()), package)


def find_config(name: str) -> Path:
    """Find a config by path, or by name among the shipped ones (`pretrain/vit_b16_etpp`)."""
    shipped = shipped_configs()
    path = expand_path(Path(name), "config")
    if path.is_file():
        return path
    known = sorted(
        path.relative_to(shipped).with_suffix("").as_posix() for path in shipped.rglob("*.yaml")
    )
    if name.removesuffix(".yaml") in known:
        return shipped / f"{name.removesuffix('.yaml')}.yaml"
    # A name may omit its budget if there is only one: vit_b16_etpp is vit_b16_etpp_400ep.
    of_any_budget = [full for full in known if re.fullmatch(re.escape(name) + r"_\d+ep", full)]
    if len(of_any_budget) == 1:
        return shipped / f"{of_any_budget[0]}.yaml"
    here = sorted(str(file) for place in {Path(), path.parent} for file in place.glob("*.y*ml"))
    meant = suggest_config(name, here + known)
    kinds = sorted({re.sub("/.*", "/NAME", full) for full in known})
    shipped_ones = f"; shipped configs, in {shipped}: {', '.join(kinds)}"
    hint = meant or f"{shipped_ones} (mae-et configs lists them)"
    raise UserError(f"there is no config {name!r}{hint}")


def suggest_config(name: str, known: list[str]) -> str:
    """Suggest configs: same name in another folder, another budget, or similar spelling."""
    stem = Path(name).stem
    stems = {full: Path(full).stem for full in known}
    close = difflib.get_close_matches(stem, stems.values(), n=1, cutoff=0.8)
    found = (
        [full for full in known if stems[full] == stem],
        [full for full in known if re.fullmatch(re.escape(stem) + r"_\d+ep", stems[full])],
        [full for full in known if stems[full] in close],
    )
    meant = next((full for full in found if full), [])
    return f"; did you mean {' or '.join(meant[:3])}?" if stem and meant else ""
