# `make demo` on a fresh machine needs python3.11, make and a C++ compiler (DeepSpeed builds its parts); the rest comes here.
# Without a GPU, `UV_TORCH_BACKEND=cpu make demo` takes torch's own CPU build in place of PyPI's, which brings CUDA.

PYTHON ?= python3.11
VENV ?= .venv
BIN = $(VENV)/bin

# Ray starts dozens of processes; without cached bytecode each of them would compile torch's and Ray's sources again.
unexport PYTHONDONTWRITEBYTECODE

# A folder of wheels that pip is configured with counts for uv, too, if it exists (a missing one is an error in uv).
INSTALL = links="$$($(BIN)/python -m pip config list | sed -n "s/.*find-links='\(.*\)'/\1/p" | head -n 1)"; \
	if [ -d "$$links" ]; then export UV_FIND_LINKS="$$links"; fi; \
	$(BIN)/uv pip install --python $(BIN)/python --constraints constraints.txt --editable

.PHONY: demo serve test lint format evidence

demo: $(VENV)/user.stamp
	$(BIN)/speechgpt demo

serve: $(VENV)/user.stamp
	$(BIN)/speechgpt serve

# First what does without Ray, on two cores at once, then the rest, whose clusters take both, the fast ones first
# (tests/conftest.py). Both parts run, so that one look shows all that is wrong.
test: $(VENV)/developer.stamp
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "not ray and not evidence"; apart=$$?; \
	$(BIN)/python -m pytest -m "ray and not evidence" && exit $$apart

lint: $(VENV)/developer.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/developer.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The long proofs; they write reports/evidence.json and reports/evidence.md.
evidence: $(VENV)/developer.stamp
	$(BIN)/python -m pytest -m evidence

$(BIN)/uv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv

$(VENV)/user.stamp: pyproject.toml constraints.txt | $(BIN)/uv
	$(INSTALL) '.[voices,judge]'
	touch $@

$(VENV)/developer.stamp: pyproject.toml constraints.txt | $(BIN)/uv
	$(INSTALL) '.[voices,judge,mos,test]'
	touch $@ $(VENV)/user.stamp
