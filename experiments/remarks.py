"""What a finished study says of itself in sentences, printed at its end and kept for its page (``remarks.json``)."""

from experiments.folder import read_record
from experiments.forecast import outcomes
from experiments.paired import families_apart, remarks
from experiments.study import Study
from experiments.table import read_trials
from genrec_jax.train.places import Place
from genrec_jax.train.record import write_json


def write_remarks(study: Study, out: Place) -> list[str]:
    """How far the families are apart beside the noise of their evaluation, what came of forecasts, and what the study
    itself concludes."""
    rows = read_trials(out)
    found = remarks(families_apart(out, rows)) + outcomes(out)
    if study.conclude is not None:
        found += study.conclude(out, [row for row in rows if row["study"] == study.name])
    write_json(out / "remarks.json", {"remarks": found})
    return found


def read_remarks(folder: Place) -> list[str]:
    """The paragraphs of a study's folder; none for one that has not come to its end."""
    return list((read_record(folder / "remarks.json") or {}).get("remarks", []))
