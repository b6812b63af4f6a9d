// Promql asks Prometheus' own code what it makes of what is on its standard input. It is a
// module of its own, so that the driver depends on nothing of Prometheus.
//
//	promql         which PromQL expressions, of a JSON list of strings, do not parse
//	promql alerts  when alerts fire over recorded series: [question], [answer]
package main

import (
	"encoding/json"
	"fmt"
	"os"

	"github.com/prometheus/prometheus/promql/parser"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == "alerts" {
		var q question
		read(&q)
		a, err := q.answer()
		if err == nil {
			err = json.NewEncoder(os.Stdout).Encode(a)
		}
		end(err)
		return
	}
	var all []string
	read(&all)
	failed := false
	for _, expr := range all {
		if _, err := parser.NewParser(parser.Options{}).ParseExpr(expr); err != nil {
			fmt.Printf("%s: %v\n", expr, err)
			failed = true
		}
	}
	if failed {
		os.Exit(1)
	}
}

func read(into any) { end(json.NewDecoder(os.Stdin).Decode(into)) }

func end(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "promql:", err)
		os.Exit(2)
	}
}
