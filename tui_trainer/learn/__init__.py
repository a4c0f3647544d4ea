"""Learning by watching: pages whose numbers are measured on live models."""
