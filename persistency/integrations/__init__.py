"""Integrations: what connects jobs with tools that a service has already, one module per matter.

`prometheus` and `opentelemetry` show what jobs do as metrics. Each module needs the extra of its name
(`pip install 'persistency[prometheus]'`), and says so in one line where it is missing.

Rules:
  1. They stand on the public surface of the package alone: what they do a service could do itself.
  2. Nothing outside this folder imports them, and importing the package brings none of them in.
  3. They watch, and change nothing: no job is woken, opened or kept open for them.

Doesn't know: how a job is run, or stored.
"""
