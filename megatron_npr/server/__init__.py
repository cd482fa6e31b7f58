"""`npr serve`: a model over HTTP as OpenAI's clients know it, its branches marked in extension fields.

    HTTP ──► Gate (key, counts) ──► app (routes) ──► schema ──► Prompts ──► submit ──► AsyncEngine
                                                                               │
    HTTP ◄── replies (one JSON, or events) ◄── decode ◄── Transcript ◄── TokenEvent ┘

A Transcript makes text of token events: packed order, whole characters, stop strings. Starlette and uvicorn carry HTTP;
bodies are read and refused by ourselves, in OpenAI's shape of errors, so a framework that validates would be in the way.
"""
