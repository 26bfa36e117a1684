"""What every engine has to do and to withstand, as checks that any engine can be put to (sandbox.md 8, 10).

`suite.CHECKS` lists them; a `Bench` makes boxes of one engine. Nothing here needs pytest: `tests/sandbox` calls it for
our engines, and whoever writes another engine can call it for his.
"""
