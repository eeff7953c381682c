"""A bounded model of secure aggregation: honest devices across rounds and restarts, and a server that may do anything.

`devices` has a device's answers, `knowledge` what the server can work out, `promises` what must hold in every state;
`search` visits all states, within the bounds of `scenarios`. docs/secure-aggregation.md, "The model", says what holds.
"""
