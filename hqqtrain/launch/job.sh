told() { cat "$folder/status.json" 2>/dev/null || true; }
saved() { printf '%s\n' "$folder"/checkpoints/*; }

before="$(told)" had="$(saved)" code=0
"${hqqtrain[@]}" "${words[@]}" || code=$?

# 3 says preempted, all saved. Where srun had to end other ranks it says more than 3, and what the
# run has written since counts.
now="$(told)"
if ((code != 0 && code != 3)) && [[ $now != "$before" && $now == *'"status": "preempted"'* ]]; then
  code=3
fi
if ((code == 3)); then
  if [[ $before == *'"status": "preempted"'* && $(saved) == "$had" ]]; then
    echo "hqqtrain: preempted twice with nothing saved in between; give it more launch.time." >&2
  else
    echo "hqqtrain: preempted; requeued, to go on where it was." >&2
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$code"
