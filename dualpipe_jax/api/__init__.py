"""An HTTP API around the serving engine, in the form of OpenAI's.

A request's way: `app` (routes and limits), `fields` (its JSON, checked), `generating`
(its completions), `worker` (the engine's thread), and back by `answers`.

Imports: deepseek.serve, tokens.
"""

from dualpipe_jax.api.app import Api, Limits
from dualpipe_jax.api.server import Server as Server, bind as bind, serve as serve

__all__ = ["Api", "Limits"]
