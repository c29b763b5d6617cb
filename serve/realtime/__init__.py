"""OpenAI's Realtime API: a core without input and output, and a thin shell that holds a session's socket and tasks."""
