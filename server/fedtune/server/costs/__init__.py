"""The costs of a run: what each round took, its sum in a ledger, prices, and the budgets that end a run.

`work_counter` counts a round's work before it is stored, `power` reads the machine's power, `cost_ledger` sums up what
rounds.jsonl has, `budget` compares the sum with the job's limits, and `cost_statement` tells it.
"""
