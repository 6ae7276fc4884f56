"""Losses: one small module a paper, each with its equation, shapes and reductions.

A module has `Settings` (what a recipe may say of it, with its name as `type`), `reads(settings)` (what it reads
of student and batch), `need(name, settings, student)` (what it reads from a store, or None) and an `nn.Module`
`Method(name, settings, student, given)` with a `row` for the printed table (or None), called with a `Step`.
`POOLED = True` says that students that pool their patches, such as PiT, learn by it too. What it keeps of a step for
later ones goes into a `student.losses.parts.queue.Queue` of its own. A module that is put here is a method from then
on: docs/adding-a-method.md.
"""
