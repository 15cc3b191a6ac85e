"""The families of a study at the top of their ladders: which trials are compared, and what the page says of them."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from experiments.compare import compare_command
from experiments.paired import Apart, families_apart
from experiments.remarks import read_remarks, write_remarks
from experiments.run import write_report
from experiments.study import Study
from experiments.table import read_trials, rebuild_table
from genrec_jax.config import default_trial
from genrec_jax.errors import UserError
from genrec_jax.noise import UserSums, difference
from genrec_jax.train.record import write_json, write_users

STUDY = Study("versus", "Versus", "Who wins?", {}, "ne", "train_flops")


class Records:
    """A study's folder, filled by hand."""

    def __init__(self, out: Path):
        self.out = out
        self.numbers = itertools.count()
        rng = np.random.default_rng(0)
        self.users = np.repeat(np.arange(50), rng.integers(1, 9, 50))
        self.labels = rng.integers(0, 2, (len(self.users), 1))

    def add(
        self,
        family: str,
        label: str,
        flops: float,
        seed: int = 0,
        skill: float = 0.5,
        axis: str = "train_flops",
        **more: object,
    ) -> UserSums:
        """A finished trial that is right to the degree of its ``skill``; returns what its users add to NE."""
        number = next(self.numbers)
        folder = self.out / "trials" / f"trial{number}"
        folder.mkdir(parents=True)
        noise = np.random.default_rng(number).normal(size=self.labels.shape)
        sums = UserSums.of(("like",), skill * (2 * self.labels - 1) + 0.3 * noise, self.labels, self.users)
        write_json(folder / "config.json", default_trial("dlrm").to_json() | {"seed": seed})
        place = {"study": STUDY.name, "family": family, "label": label, "axis": axis, "axis_value": None}
        write_json(folder / "plan.json", {"placements": [place]})
        known = {"status": "done", "train_flops": flops, "ne": float(sums.mean_ne()), "eval_set": "e", "dataset": "d"}
        write_json(folder / "result.json", known | more)
        write_users(folder / "users.npz", sums)
        return sums

    def apart(self) -> list[Apart]:
        return families_apart(self.out, read_trials(self.out))


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(tmp_path / "study")


def test_families_are_compared_where_all_of_them_were(records: Records) -> None:
    """HSTU went further than DLRM: it is held against it at the rung nearest to DLRM's last, by ratio."""
    records.add("dlrm", "s0", 1e10)
    top = [records.add("dlrm", "s1", 1e11, seed=seed) for seed in (0, 1)]
    records.add("hstu", "s0", 0.9e10)
    own = [records.add("hstu", "s1", 2e11, skill=0.8)]
    records.add("hstu", "s2", 9e11)
    records.add("dcn", "s1", 1e12, status="diverged")
    (found,) = records.apart()
    assert (found.base.family, found.base.label, found.new.family, found.new.label) == ("dlrm", "s1", "hstu", "s1")
    assert (len(found.base.trials), len(found.new.trials)) == (2, 1)
    assert found.apart == difference(top, own)
    assert found.apart.value < 0 < found.apart.error < found.apart.unpaired
    assert found.new_ne == own[0].mean_ne()
    assert found.users == 50


def test_without_dlrm_the_first_by_name_is_the_base(records: Records) -> None:
    for family in ("hstu", "dirl", "transformer"):
        records.add(family, "s0", 1e10)
    assert [(one.base.family, one.new.family) for one in records.apart()] == [("dirl", "hstu"), ("dirl", "transformer")]


def test_what_has_no_top_or_no_record_is_left_out(records: Records) -> None:
    records.add("dlrm", "s0", 1e10)
    records.add("hstu", "rate=1", 1e10)
    records.add("hstu", "rate=2", 1.01e10)  # as large: which of them stands for the family?
    records.add("dirl", "s0", 1e10)
    (records.out / "trials/trial3/users.npz").unlink()
    records.add("dcn", "s0", 1e10, eval_set="other")
    assert records.apart() == []


def test_the_page_says_how_much_of_a_difference_is_noise(records: Records, tmp_path: Path) -> None:
    for rung, flops in enumerate((1e10, 1e11)):
        records.add("dlrm", f"s{rung}", flops)
        records.add("hstu", f"s{rung}", flops, skill=0.8)
    (found,) = records.apart()
    (said,) = write_remarks(STUDY, records.out)
    assert f"hstu {found.apart.value:+.4f} ± {found.apart.error:.4f}" in said
    assert f"{found.apart.unpaired:.4f}" in said
    assert "50 evaluation users" in said
    assert read_remarks(records.out) == [said]
    rebuild_table(records.out)
    write_json(records.out / "study.json", {"title": STUDY.title, "summary": STUDY.question, "metric": "ne"})
    write_report([records.out], tmp_path / "page.html")
    assert said.replace("'", "&#x27;") in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_study_of_one_folder_is_compared_by_its_families(
    records: Records, capsys: pytest.CaptureFixture[str]
) -> None:
    records.add("dlrm", "s0", 1e10)
    with pytest.raises(UserError, match="no two families"):
        compare_command([records.out])
    records.add("hstu", "s0", 1e10, skill=0.8)
    (found,) = records.apart()
    compare_command([records.out])
    _, base, new, *said = capsys.readouterr().out.splitlines()
    assert base.split() == ["dlrm", "s0", "1.00e+10", f"{found.base_ne:.4f}"]
    assert f"{found.apart.low:+.4f} to {found.apart.high:+.4f}" in new
    assert f"{found.apart.unpaired / found.apart.error:.1f} times as wide" in " ".join(said)
    assert not (records.out / "results.csv").exists()


def test_a_study_adds_its_own_conclusion(records: Records) -> None:
    records.add("dlrm", "s0", 1e10)
    study = Study("versus", "", "", {}, "ne", "", conclude=lambda out, rows: [f"{len(rows)} row in {out.name}"])
    assert write_remarks(study, records.out) == ["1 row in study"]
    assert json.loads((records.out / "remarks.json").read_text(encoding="utf-8")) == {"remarks": ["1 row in study"]}


def test_a_study_along_another_axis_has_no_top(records: Records) -> None:
    """The most epochs, say, are not what its families are best at."""
    for family in ("dlrm", "hstu"):
        records.add(family, "epochs=4", 1e10, axis="epochs")
    assert records.apart() == []
