"""Integrations: what connects jobs with tools that a service has already, one module per matter.

| module | connects with | the extra |
|---|---|---|
| `prometheus`, `opentelemetry` | metrics | of the same name |
| `keyvalue` | py-key-value: a store, and its sync twin | `keyvalue` |
| `langgraph` | LangGraph: checkpoints, and long-term memory | `langgraph` |
| `django` | Django's cache | `django` |
| `starlette` | Starlette and FastAPI: sessions | `starlette` |
| `migration` | `diskcache`, `sqlitedict`, LMDB: their items come over | `lmdb`, for LMDB |

Each says in one line which extra it needs where that is missing (`pip install 'persistency[prometheus]'`).

Rules:
  1. They stand on the public surface of the package alone: what they do a service could do itself.
  2. Nothing outside this folder imports them, and importing the package brings none of them in.
  3. Those that show metrics watch, and change nothing: no job is woken, opened or kept open for them.

Doesn't know: how a job is run, or stored.
"""
