"""Regression checks: snapshots of what a recipe makes of a model, graded differences, goldens for pytest and for CI.

`snapshot` takes and reads snapshots, `diff` grades what changed between two, `golden` compares a model with the
snapshot in a repository. `plugin` is the same for pytest, `lock` for `kvpass check`.
"""
