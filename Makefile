# Wrappers around the README's two commands.
.PHONY: demo test

demo:
	python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e . && .venv/bin/hesscope demo

test:
	python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e '.[test]' && .venv/bin/pytest -q
