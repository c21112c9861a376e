"""Run a GGUF: Llama, chat, and the routing of experts at run time."""
