// Promql says which of the PromQL expressions on its standard input, a JSON list
// of strings, do not parse. It is a module of its own, so that the driver depends
// on nothing of Prometheus.
package main

import (
	"encoding/json"
	"fmt"
	"os"

	"github.com/prometheus/prometheus/promql/parser"
)

func main() {
	var all []string
	if err := json.NewDecoder(os.Stdin).Decode(&all); err != nil {
		fmt.Fprintln(os.Stderr, "promql:", err)
		os.Exit(2)
	}
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
