"""The training of many clients with torch: side by side where that is possible, and one after another where it is not.

    train_all = JointTraining(trainer, most=8, note=display.note)
    outcomes = train_all(tasks)

Tasks of different work (a slow device of a fleet does fewer steps) are trained in passes of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import torch

from fedtune.client.rendezvous import outcome_of
from fedtune.client.torch.side_by_side import reason_against, train_together
from fedtune.client.torch.torch_trainer import TorchTrainer, is_out_of_memory
from fedtune.client.trainer import UNLIMITED, ClientTask, Outcome
from fedtune.model.side_by_side_layers import MixedRowsError

Note = Callable[[str], None]


class JointTraining:
    """Trains tasks in passes of up to `most` clients, as `fedtune.client.rendezvous.TrainAll` describes.

    Where memory runs out, passes have half as many clients from then on, and where it runs out again, clients train one
    after another. That changes updates by rounding alone.

    Args:
        trainer: the trainer of single clients; its model is used for all.
        most: K, the most clients in a pass.
        note: told once why clients train in smaller passes or one after another.
    """

    def __init__(self, trainer: TorchTrainer, most: int, note: Note) -> None:
        self._trainer, self._note = trainer, note
        self._most = most
        self._halved = False
        if most > 1 and (reason := reason_against(trainer.model)):
            self._one_by_one(reason)

    def __call__(self, tasks: Sequence[ClientTask]) -> list[Outcome]:
        """Returns an outcome for each task."""
        outcomes: dict[int, Outcome] = {}
        for alike in _alike(tasks):
            while left := [index for index in alike if index not in outcomes]:
                first = left[: self._most]
                made = self._try([tasks[index] for index in first])
                if made is not None:
                    outcomes.update(zip(first, made, strict=True))
        return [outcomes[index] for index in range(len(tasks))]

    def _try(self, tasks: Sequence[ClientTask]) -> list[Outcome] | None:
        """Trains tasks of the same work; returns None where that has to be tried again in smaller passes."""
        # A trainer with limits is short of memory for a single client already.
        if len(tasks) == 1 or self._most == 1 or self._trainer.limits != UNLIMITED:
            return [outcome_of(self._trainer, each) for each in tasks]
        try:
            return train_together(self._trainer.model, tasks)
        except MixedRowsError as error:
            self._one_by_one(str(error))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._shrink(len(tasks))
        # Outside the handlers, whose tracebacks would keep the failed pass's tensors alive.
        if self._trainer.model.base.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _shrink(self, tried: int) -> None:
        if self._halved or tried // 2 < 2:
            self._one_by_one(f"memory ran out with {tried} in a pass")
            return
        self._halved, self._most = True, tried // 2
        self._note(f"memory ran out with {tried} clients in a pass; it has {self._most} from now on")

    def _one_by_one(self, reason: str) -> None:
        self._most = 1
        self._note(f"clients train one after another, whatever simulation.together says: {reason}")


def _alike(tasks: Sequence[ClientTask]) -> list[list[int]]:
    """Returns the tasks' indices by their work, in the order of the first task of each."""
    groups: dict[tuple[bytes, int | None], list[int]] = {}
    for index, each in enumerate(tasks):
        key = (msgspec.msgpack.encode(each.task.work), each.task.micro_batch_tokens)
        groups.setdefault(key, []).append(index)
    return list(groups.values())
