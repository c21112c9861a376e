"""Run a GGUF: Llama, chat, and the routing of experts at run time.

- llama.py         Llama: llama_cpp.Llama on the patched runtime   - routing_api.py  routing calls (ctypes)
- opening.py       the file and the options that it opens          - arguments.py    ranges of options
- requests.py      checks of completions, chats and states         - turns.py        one call at a time
- conversation.py  a conversation with its history                 - prompt.py       what is typed
- chat.py          talk in the terminal
"""
