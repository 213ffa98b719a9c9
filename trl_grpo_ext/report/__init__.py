"""What a run did, and why: its record, what is wrong with it, and a page that shows both.

- [`trl_grpo_ext.report.record`]: `record.jsonl`, which the trainer writes, and how it is read;
- [`trl_grpo_ext.report.callback`]: the callback that writes it, and [`trl_grpo_ext.report.about`], what it says of
  the run;
- [`trl_grpo_ext.report.generations`]: a generation's rewards in numbers;
- [`trl_grpo_ext.report.doctor`]: what is wrong with a run, by rules over its record, and
  [`trl_grpo_ext.report.watch`], the doctor during training;
- [`trl_grpo_ext.report.page`]: the page, with the sentence of [`trl_grpo_ext.report.summary`], the charts of
  [`trl_grpo_ext.report.pictures`] and the texts of [`trl_grpo_ext.report.completions`].

Reading a record imports no torch.
"""
