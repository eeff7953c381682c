"""Secure aggregation, sans I/O: the server learns the sum over the survivors of a round and nothing else.

`ClientSession` and `ServerSession` take messages and return messages through five exchanges.
docs/secure-aggregation.md states the threat model, the protocol byte by byte, and the limits of its guarantees.
"""

from fedtune.core.errors import ClientFaultError, RoundAbortedError, ServerFaultError
from fedtune.core.secagg.client_session import ClientSession
from fedtune.core.secagg.config import Assumptions, Policy, Subject, round_config
from fedtune.core.secagg.exchanged import Member, RoundConfig, Segment
from fedtune.core.secagg.graph import Thresholds, choose_thresholds
from fedtune.core.secagg.identity import Identity, Roster
from fedtune.core.secagg.round_log import FileRoundLog, MemoryRoundLog, RoundLog, RoundMark, Served
from fedtune.core.secagg.server_session import OpenedSum, ServerSession, Stage

__all__ = [
    "Assumptions",
    "ClientFaultError",
    "ClientSession",
    "FileRoundLog",
    "Identity",
    "Member",
    "MemoryRoundLog",
    "OpenedSum",
    "Policy",
    "Roster",
    "RoundAbortedError",
    "RoundConfig",
    "RoundLog",
    "RoundMark",
    "Segment",
    "Served",
    "ServerFaultError",
    "ServerSession",
    "Stage",
    "Subject",
    "Thresholds",
    "choose_thresholds",
    "round_config",
]
