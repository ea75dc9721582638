"""Published checkpoints in the form in which their users have them: read, compared with the model, converted, loaded.

    folder or headers file -> snapshot.py: configurations, tensor headers, fingerprint; nothing is executed
    field_tables.py, fields.py -> our configuration, each value with where it is from
    tensor_tables.py, map_file.py -> rules: name of a tensor there -> here
    assignment.py (+ proposals.py) -> plan.py: every tensor used once, every parameter filled
    plan -> report.py (`casa checkpoint inspect`), converting.py (`convert`), views.py (loading in place)
                          text_files.py, templates.py: tokenizer, chat template, image processing

No published file could be read when this was written: what a table calls `known` was read in public scripts, what it
calls `unverified` is a candidate. docs/checkpoints.md says how to finish it with a real folder.
"""
