"""Learning by watching: scalar graphs, and pages whose numbers are measured on live models."""
