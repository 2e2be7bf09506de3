"""Border to Flower: the same federation across machines. `app` is what Flower runs.

`wire` turns adapters into messages and back, `node` is a client's half, `strategy` the server's,
`project` writes an app that `flwr run` takes, `engine` runs one on this machine.
"""
