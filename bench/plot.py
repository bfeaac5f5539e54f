#
# Plots of what the benchmark has found, made by gnuplot as SVG
#
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import statistics
import subprocess


def quartiles(values):
    return (statistics.quantiles(values, method='inclusive')
            if len(values) > 1 else values * 3)


def _gnuplot(path, height, title, commands, series):
    """SERIES are (title, rows, style)."""
    script = [f'set terminal svg size 900,{height} font "sans,13" '
              'background "white"', f'set output "{path}"',
              f'set title "{title}"', 'set grid', 'set key below samplen 2',
              *commands]
    for i, (_, rows, _) in enumerate(series):
        script += [f'$data{i} << END',
                   *(' '.join(map(str, row)) for row in rows), 'END']
    script.append('plot ' + ', '.join(
        f'$data{i} {style} title "{name}"'
        for i, (name, _, style) in enumerate(series)))
    subprocess.run(['gnuplot'], input='\n'.join(script), text=True, check=True)


def points(out, name, title, results, labels, places, bars=False):
    """Medians, with quartiles or as BARS; PLACES are (text, case, figure)."""
    places = [place for place in places
              if any((place[1], label, place[2]) in results
                     for label in labels)]
    if not places:
        return
    tics = ', '.join(f'"{text}" {len(places) - i}'
                     for i, (text, _, _) in enumerate(places))
    step = 0.8 / len(labels) if bars else 0.15
    series = []
    for number, label in enumerate(labels):
        rows = []
        for i, (_, case, figure) in enumerate(places):
            values = results.get((case, label, figure))
            if values:
                low, median, high = quartiles(values)
                rows.append((median, len(places) - i + step *
                             ((len(labels) - 1) / 2 - number), low, high))
        if rows and bars:
            series += [
                (label, rows, f'using (0):2:(0):1:($2-{step * 0.45}):'
                 f'($2+{step * 0.45}) with boxxyerror fillstyle solid 0.8 '
                 f'linetype {number + 1}'),
                ('', rows, 'using 1:2:(sprintf("%.0f", $1)) '
                 'with labels left offset 0.5,0')]
        elif rows:
            series.append((label, rows,
                           'with xerrorbars pointtype 7 pointsize 0.7'))
    axis = (['set offsets 0, graph 0.08, 0, 0', 'set xrange [0:*]',
             'set xlabel "ms, median; shorter is better"'] if bars else
            ['set logscale x', 'set xlabel "ms, median and quartiles"'])
    _gnuplot(os.path.join(out, name + '.svg'),
             200 + (60 if bars else 32) * len(places), title,
             axis + [f'set ytics ({tics})',
                     f'set yrange [0.4:{len(places) + 0.6}]'], series)
