"""Objects, lines and files that carry their checksum."""

import json
from pathlib import Path

import pytest
from flipped import flipped

from mae_et.errors import UserError
from mae_et.io.metrics_file import DYNAMICS, METRICS, SCORES, read_metrics, row_line
from mae_et.io.seals import check_sealed, read_sealed, seal, sealed_bytes, unseal

CONTENT = {"classes": ["a", "\u00e9"], "images": 12, "share": 0.1, "nested": {10: 1, 9: None}}


def test_sealed_object_is_read_back_in_any_order_of_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    sealed = json.loads(json.dumps(seal(CONTENT)))
    path.write_text(json.dumps(dict(reversed(sealed.items())), indent=3))
    assert read_sealed(path) == json.loads(json.dumps(CONTENT))


def test_object_is_refused_after_any_change_of_a_value(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    changes = [{"images": 13}, {"classes": ["b", "\u00e9"]}, {"share": 0.2}, {"more": 1}]
    for change in changes:
        path.write_text(json.dumps(seal(CONTENT) | change))
        with pytest.raises(UserError, match=r"a\.json is damaged: it does not match"):
            read_sealed(path)
    path.write_text(json.dumps(CONTENT))
    with pytest.raises(UserError, match=r"a\.json is damaged: it has no checksum"):
        read_sealed(path)
    with pytest.raises(ValueError, match="no checksum"):
        unseal({})


def test_file_is_refused_after_any_flipped_bit_or_cut(tmp_path: Path) -> None:
    path = tmp_path / "a"
    whole = sealed_bytes(bytes(range(40)))
    # The last is read in two parts.
    for content in (whole, sealed_bytes(b""), sealed_bytes(bytes(2**20 + 1))):
        path.write_bytes(content)
        check_sealed(path)
    damaged = [flipped(whole, bit) for bit in range(0, 8 * len(whole), 3)]
    damaged += [whole[:length] for length in range(0, len(whole), 5)]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="checksum"):
            check_sealed(path)


@pytest.mark.parametrize("record", [SCORES, DYNAMICS])
def test_damaged_scores_are_skipped_with_a_warning(tmp_path: Path, record: str) -> None:
    rows = [{"step": step, "time": 0.5, "top1": 10.0 * step} for step in (1, 2, 3)]
    lines = [row_line(row, record) for row in rows]
    changed = lines[1].replace("20.0", "90.0")
    assert changed != lines[1]
    (tmp_path / record).write_text(lines[0] + changed + lines[2])
    with pytest.warns(UserWarning, match="damaged: skipped line 2"):
        assert read_metrics(tmp_path, record) == [rows[0], rows[2]]
    assert row_line(rows[0], METRICS) == json.dumps(rows[0]) + "\n"
