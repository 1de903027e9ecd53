package main

import (
	"bytes"
	"errors"
	"image/color"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	_ "gonum.org/v1/plot/vg/vgimg" // for PNG
	_ "gonum.org/v1/plot/vg/vgsvg"
)

// A series is a line of a plot.
type series struct {
	name   string
	value  func(point) float64
	theirs bool
	dashed bool
}

// plot draws what an agent costs by the number of agents, as an SVG or PNG.
func (r *run) plot(path string) error {
	if len(r.points) == 0 {
		return errors.New("the group agents was not measured, so there is nothing to draw")
	}
	ms := func(m metric) (ours, theirs func(point) float64) {
		return func(p point) float64 { return p.our[m] / float64(time.Millisecond) },
			func(p point) float64 { return p.their[m] / float64(time.Millisecond) }
	}
	messages := func(ms ...metric) (ours, theirs func(point) float64) {
		sum := func(values [metrics]float64) (x float64) {
			for _, m := range ms {
				x += values[m]
			}
			return x
		}
		return func(p point) float64 { return sum(p.our) }, func(p point) float64 { return sum(p.their) }
	}
	lines := func(ours, theirs, oursAlone, theirsAlone func(point) float64) []series {
		return []series{
			{"nats.go KV", theirs, true, false},
			{"nats.go KV, not watching", theirsAlone, true, true},
			{"state", ours, false, false},
			{"state, not watching", oursAlone, false, true},
		}
	}
	cpu, theirCPU := ms(serverCPU)
	cpuAlone, theirCPUAlone := ms(serverCPUAlone)
	all, theirAll := messages(sent, received)
	allAlone, theirAllAlone := messages(sentAlone, receivedAlone)
	plot.DefaultFont.Variant = "Sans"
	left, err := r.costPlot("Server CPU per agent, ms per second", lines(cpu, theirCPU, cpuAlone, theirCPUAlone))
	if err != nil {
		return err
	}
	right, err := r.costPlot("Messages per agent and second, in and out", lines(all, theirAll, allAlone, theirAllAlone))
	if err != nil {
		return err
	}
	canvas, err := draw.NewFormattedCanvas(24*vg.Centimeter, 10*vg.Centimeter, strings.TrimPrefix(filepath.Ext(path), "."))
	if err != nil {
		return err
	}
	plots := [][]*plot.Plot{{left, right}}
	tiles := draw.Tiles{Rows: 1, Cols: 2, PadX: 8 * vg.Millimeter, PadTop: 2 * vg.Millimeter, PadBottom: 2 * vg.Millimeter, PadLeft: 2 * vg.Millimeter, PadRight: 4 * vg.Millimeter}
	for i, c := range plot.Align(plots, tiles, draw.New(canvas))[0] {
		plots[0][i].Draw(c)
	}
	var image bytes.Buffer
	if _, err := canvas.WriteTo(&image); err != nil {
		return err
	}
	// A reader who does not have the font should get a similar one.
	data := bytes.ReplaceAll(image.Bytes(), []byte("font-family:Liberation Sans;"), []byte("font-family:Liberation Sans,Arial,sans-serif;"))
	return os.WriteFile(path, data, 0o644)
}

// costPlot makes a plot with logarithmic axes. Solid lines include the watches
// of who is alive.
func (r *run) costPlot(title string, lines []series) (*plot.Plot, error) {
	p := plot.New()
	p.BackgroundColor = color.White // it is read on dark pages, too
	p.Title.Text = title
	p.Title.Padding = vg.Points(6)
	p.X.Label.Text = "agents"
	p.X.Scale, p.Y.Scale = plot.LogScale{}, plot.LogScale{}
	var ticks plot.ConstantTicks
	for _, point := range r.points {
		ticks = append(ticks, plot.Tick{Value: float64(point.agents), Label: count(point.agents)})
	}
	p.X.Tick.Marker = ticks
	p.Y.Tick.Marker = plot.TickerFunc(logTicks)
	p.Add(plotter.NewGrid())
	for _, s := range lines {
		var xys plotter.XYs
		for _, point := range r.points {
			if y := s.value(point); y > 0 { // else it has no logarithm
				xys = append(xys, plotter.XY{X: float64(point.agents), Y: y})
			}
		}
		line, points, err := plotter.NewLinePoints(xys)
		if err != nil {
			return nil, err
		}
		line.Color = color.RGBA{R: 0x1f, G: 0x77, B: 0xb4, A: 0xff}
		points.Shape = draw.CircleGlyph{}
		if s.theirs {
			line.Color = color.RGBA{R: 0xd6, G: 0x6a, B: 0x00, A: 0xff}
			points.Shape = draw.SquareGlyph{}
		}
		line.Width = vg.Points(1.5)
		points.Color = line.Color
		if s.dashed {
			line.Dashes = []vg.Length{vg.Points(4), vg.Points(3)}
		}
		p.Add(line, points)
		p.Legend.Add(s.name, line, points)
	}
	p.Legend.Top, p.Legend.Left = true, true
	p.Y.Min /= 1.3
	p.Y.Max *= math.Pow(p.Y.Max/p.Y.Min, 0.45) // room for the legend
	return p, nil
}

// logTicks labels 1, 2, 5, 10, 20, ...
func logTicks(low, high float64) (ticks []plot.Tick) {
	for decade := math.Pow(10, math.Floor(math.Log10(low))); decade <= high; decade *= 10 {
		for _, digit := range []float64{1, 2, 5} {
			if x := digit * decade; x >= low && x <= high {
				ticks = append(ticks, plot.Tick{Value: x, Label: strconv.FormatFloat(x, 'f', -1, 64)})
			}
		}
	}
	return ticks
}
