"""fedtune from Python: make a job, simulate it on data in memory or in files, look at its rounds, and export its model.

    from fedtune.api import export, load_job, load_run, resume, simulate

    job = load_job("job.toml", training={"local_steps": 5}, federation={"rounds": 8})
    run = simulate(job, "runs/first", clients={"kitchen": rows, "hall": frame}, on_round=print)
    run.rounds()                    # a pandas DataFrame, one row a round
    export(run, "int4")             # the folder of an ONNX model

The command line does the same with the same files: a run that was begun here can be resumed, reported and exported
there, and the other way round.
"""

from fedtune.api.frames import rounds_frame
from fedtune.api.rows import Rows
from fedtune.api.runs import Run, export, load_job, load_run, resume, simulate
from fedtune.core.errors import FedtuneError, InputError, JobError, RunError
from fedtune.core.job.settings import Job
from fedtune.core.round_records import RoundRecord
from fedtune.server.custom_metrics import AnswerMetric

__all__ = [
    "AnswerMetric",
    "FedtuneError",
    "InputError",
    "Job",
    "JobError",
    "RoundRecord",
    "Rows",
    "Run",
    "RunError",
    "export",
    "load_job",
    "load_run",
    "resume",
    "rounds_frame",
    "simulate",
]
