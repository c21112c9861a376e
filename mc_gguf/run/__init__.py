"""Run a GGUF: Llama, chat, and the routing of experts at run time.

- llama.py         Llama: llama_cpp.Llama on the patched runtime   - routing_api.py  routing calls (ctypes)
- conversation.py  a conversation with its history                 - chat.py         talk in the terminal
"""
