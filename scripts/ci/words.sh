#!/usr/bin/env bash
# Counts the doc comments whose first word is a pronoun or a preposition, for each crate and in all: they do not name
# their subject. `words.sh` prints; `words.sh PERCENT` also fails where more than PERCENT of all docs open so, and
# then lists them.
set -euo pipefail
cd "$(dirname "$0")/../.."

git ls-files '*.rs' | grep '/src/' | xargs awk -v limit="${1:-}" '
    FNR == 1 { inside = 0; split(FILENAME, path, "/src/"); crate = path[1] }
    !/^[[:space:]]*\/\/[\/!]( |$)/ { inside = 0; next }
    inside { next }
    {
        inside = 1; docs[crate]++; total++
        if ($2 ~ /^(Of|It|Its|Where|Until|That|Who|From|By)[^[:alnum:]]?$/) {
            poor[crate]++; all++
            lines = lines sprintf("%s:%d: %s\n", FILENAME, FNR, substr($0, match($0, /[^[:space:]]/)))
        }
    }
    END {
        for (crate in docs) {
            printf "%-16s %5d docs, %5d open with such a word, %4.1f%%\n", crate, docs[crate], poor[crate], 100 * poor[crate] / docs[crate] | "sort"
        }
        close("sort")
        share = 100 * all / total
        printf "%-16s %5d docs, %5d open with such a word, %4.1f%%\n", "all", total, all, share
        if (limit != "" && share > limit) {
            printf "%sabove the limit of %s%%\n", lines, limit
            exit 1
        }
    }'
